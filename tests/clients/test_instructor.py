"""instructor: one pydantic model in each of its modes."""

from typing import Literal

import openai
import pydantic
import pytest

from tests.clients import NOT_HERE
from tests.clients.talk import MESSAGES, TOO_LONG, City

instructor = pytest.importorskip("instructor", reason=NOT_HERE)
errors = pytest.importorskip("instructor.core", reason=NOT_HERE)

# These modes describe the schema in words; the body says what a model would make of them.
WORDS_ONLY = {
    "JSON": {
        "extra_body": {
            "response_format": {"type": "json_object", "schema": City.model_json_schema()}
        }
    },
    "MD_JSON": {
        "extra_body": {"regex": '```json\n\\{"name": "Paris", "size": "(big|small)"\\}\n```'}
    },
}
MODES = ["TOOLS", "TOOLS_STRICT", "JSON_SCHEMA", "RESPONSES_TOOLS", *WORDS_ONLY]


@pytest.fixture
def client(server):
    def client(mode, key=server.key):
        made = openai.OpenAI(base_url=server.base_url, api_key=key, max_retries=0)
        return instructor.from_openai(made, mode=instructor.Mode[mode], model=server.model)

    return client


LONG = [{"role": "user", "content": TOO_LONG}]
OPTIONS = {"messages": MESSAGES, "temperature": 0, "max_retries": 0}


@pytest.mark.parametrize("mode", MODES)
def test_structured_output(client, mode):
    found = client(mode).create(
        response_model=City, max_tokens=60, **OPTIONS, **WORDS_ONLY.get(mode, {})
    )
    assert found.name == "Paris"


def test_chat(client, plain):
    found = client("TOOLS").create(response_model=None, max_tokens=16, **OPTIONS)
    assert found.choices[0].message.content == plain(messages=MESSAGES)["content"]


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_stream(client, mode):
    made = client(mode)
    parts = list(made.create_partial(response_model=City, max_tokens=60, **OPTIONS))
    assert parts[-1].name == "Paris"
    assert parts[-1].size in ("small", "big")


class Weather(pydantic.BaseModel):
    """Get the weather of a city."""

    city: Literal["Paris"]


def test_tools_with_a_round_trip(client):
    made = client("TOOLS")
    found, answer = made.create_with_completion(response_model=Weather, max_tokens=60, **OPTIONS)
    message = answer.choices[0].message
    [call] = message.tool_calls
    told = {"role": "tool", "tool_call_id": call.id, "content": found.model_dump_json()}
    again = OPTIONS | {"messages": [*MESSAGES, message.model_dump(), told]}
    assert made.create(response_model=City, max_tokens=60, **again).name == "Paris"


def test_errors(client):
    with pytest.raises(errors.IncompleteOutputException):
        client("TOOLS").create(response_model=City, max_tokens=4, **OPTIONS)
    with pytest.raises(errors.InstructorRetryException, match="shorten"):
        client("TOOLS").create(response_model=City, **OPTIONS | {"messages": LONG})
    with pytest.raises(errors.InstructorRetryException, match="401"):
        client("TOOLS", "wrong").create(response_model=City, **OPTIONS)
