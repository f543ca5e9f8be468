"""The command line and library `llm`, told of the server by its extra-openai-models.yaml."""

import json

import openai
import pytest

from tests.clients import NOT_HERE
from tests.clients.talk import (
    CALL,
    MESSAGES,
    QUESTION,
    REPORT,
    TALE,
    TALE_MESSAGES,
    TOO_LONG,
    City,
    get_weather,
)

llm = pytest.importorskip("llm", reason=NOT_HERE)

ENTRY = """
- model_id: here
  model_name: {server.model}
  api_base: {server.base_url}
  api_key_name: here
  supports_schema: true
  supports_tools: true
- model_id: wrong
  model_name: another
  api_base: {server.base_url}
  api_key_name: here
"""


@pytest.fixture
def model(server, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    (tmp_path / "keys.json").write_text(json.dumps({"here": server.key}))
    (tmp_path / "extra-openai-models.yaml").write_text(ENTRY.format(server=server))
    return llm.get_model("here")


OPTIONS = {"temperature": 0, "max_tokens": 16}


def test_chat(model, plain):
    found = model.prompt(QUESTION, stream=False, **OPTIONS)
    assert found.text() == plain(messages=MESSAGES)["content"]


def test_stream(model, plain):
    pieces = [piece for piece in model.prompt(TALE, **OPTIONS) if piece]
    assert len(pieces) > 1
    assert "".join(pieces) == plain(messages=TALE_MESSAGES)["content"]


def test_structured_output(model):
    options = OPTIONS | {"max_tokens": 60}
    found = model.prompt(QUESTION, schema=City, **options)
    assert City.model_validate_json(found.text()).name == "Paris"


def test_tools_with_a_round_trip(model):
    chain = model.chain(CALL, tools=[get_weather], options=OPTIONS | {"max_tokens": 40})
    first, second = chain.responses()
    [call] = first.tool_calls()
    assert (call.name, call.arguments) == ("get_weather", {"city": "Paris"})
    assert [result.output for result in second.prompt.tool_results] == [REPORT]
    assert second.text()


def test_errors(model):
    with pytest.raises(openai.BadRequestError, match="shorten"):
        model.prompt(TOO_LONG).text()
    with pytest.raises(openai.NotFoundError):
        llm.get_model("wrong").prompt(QUESTION).text()
    with pytest.raises(openai.AuthenticationError):
        model.prompt(QUESTION, key="wrong").text()
