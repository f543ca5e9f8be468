"""The package `openai` of Node, run by `openai_client.mjs`."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.clients.talk import (
    GET_WEATHER,
    MESSAGES,
    REPORT,
    TALE_MESSAGES,
    TOO_LONG,
    WEATHER,
    City,
)

HERE = Path(__file__).parent
NODE = shutil.which("node")
if NODE is None or not (HERE / "node_modules/openai").exists():
    pytest.skip(
        f"Node and its package openai are not here; npm ci --prefix {HERE.name}",
        allow_module_level=True,
    )


@pytest.fixture(scope="module")
def found(server):
    talk = {
        "messages": MESSAGES,
        "tale": TALE_MESSAGES,
        "schema": City.model_json_schema(),
        "tool": GET_WEATHER,
        "weather": WEATHER,
        "report": REPORT,
        "long": TOO_LONG,
    }
    told = {"baseURL": server.base_url, "apiKey": server.key, "model": server.model, "talk": talk}
    done = subprocess.run(
        [NODE, HERE / "openai_client.mjs", json.dumps(told)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_chat(found, plain, server):
    assert found["models"] == [server.model]
    assert found["chat"] == found["response"] == plain(messages=MESSAGES)["content"]


def test_stream(found, plain):
    for pieces in (found["pieces"], found["response_pieces"]):
        assert len(pieces) > 1
        assert "".join(pieces) == plain(messages=TALE_MESSAGES)["content"]


def test_structured_output(found):
    assert City.model_validate(found["structured"]).name == "Paris"


def test_tools_with_a_round_trip(found, plain):
    assert found["call"] == ["get_weather", {"city": "Paris"}]
    same = {"messages": found["said"], "tools": [GET_WEATHER], "tool_choice": "none"}
    assert found["answer"] == plain(**same, max_tokens=40)["content"]


def test_errors(found):
    assert found["errors"] == [
        ["BadRequestError", 400, "context_length_exceeded"],
        ["NotFoundError", 404, None],
        ["AuthenticationError", 401, "invalid_api_key"],
    ]
