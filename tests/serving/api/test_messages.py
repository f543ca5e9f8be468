"""`/v1/messages`, by the shapes that Anthropic documents."""

import json

import httpx2 as httpx
import pytest

from tests.serving.api.test_openai import TALK, alone

DIG = {
    "name": "dig",
    "description": "Digs.",
    "input_schema": {
        "type": "object",
        "properties": {"deep": {"type": "boolean"}},
        "required": ["deep"],
        "additionalProperties": False,
    },
}


@pytest.fixture
def post(address):
    def post(body, path="/v1/messages", **more):
        body = {"model": "tiny", "max_tokens": 12, "messages": TALK, "seed": 2} | body
        return httpx.post(address + path, json=body, timeout=60, **more)

    return post


def events(text):
    """The events of a stream; each is named after its type."""
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def accumulated(found):
    """The message that a client puts together from a stream's events."""
    assert found[0]["type"] == "message_start"
    assert found[-1]["type"] == "message_stop"
    message, parts = found[0]["message"], {}
    for event in found[1:-1]:
        if event["type"] == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append(dict(event["content_block"]))
        elif event["type"] == "content_block_delta":
            kind = event["delta"]["type"]
            block = message["content"][event["index"]]
            if kind == "text_delta":
                block["text"] += event["delta"]["text"]
            elif kind == "thinking_delta":
                block["thinking"] += event["delta"]["thinking"]
            else:
                parts.setdefault(event["index"], []).append(event["delta"]["partial_json"])
        elif event["type"] == "content_block_stop" and event["index"] in parts:
            message["content"][event["index"]]["input"] = json.loads("".join(parts[event["index"]]))
        elif event["type"] == "message_delta":
            message |= event["delta"]
            message["usage"] |= event["usage"]
    return message


def test_an_answer_is_what_plain_decoding_writes(post, lm):
    found = post({"temperature": 0.8}).json()
    text = alone(lm, TALK, max_new_tokens=12, temperature=0.8, seed=2)
    assert found["content"] == [{"type": "text", "text": text}]
    assert (found["type"], found["role"], found["model"]) == ("message", "assistant", "tiny")
    assert (found["stop_reason"], found["stop_sequence"]) == ("max_tokens", None)
    assert found["usage"]["output_tokens"] == 12
    count = post({}, "/v1/messages/count_tokens").json()
    assert count == {"input_tokens": found["usage"]["input_tokens"]}
    assert count["input_tokens"] == len(lm.request(TALK).prompt)


@pytest.mark.parametrize(
    "body",
    [
        {"temperature": 0.8},
        {"tools": [DIG], "tool_choice": {"type": "any"}, "max_tokens": 60},
        {"stop_sequences": ["zzz", "e"], "max_tokens": 60},
        {"tools": [DIG], "tool_choice": {"type": "auto"}},
    ],
)
def test_a_stream_adds_up_to_the_whole_answer(post, body):
    whole = post(body).json()
    streamed = post(body | {"stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    found = accumulated(events(streamed.text))
    for each in (whole, found):
        del each["id"]
        for block in each["content"]:
            block.pop("id", None)
    assert found == whole


def test_the_stop_sequence_that_ended_it_is_named(post):
    found = post({"stop_sequences": ["zzz", "e"], "max_tokens": 60}).json()
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", "e")
    assert "e" not in found["content"][0]["text"]


def test_a_call_and_its_result_make_a_round_trip(post, lm):
    body = {"tools": [DIG], "tool_choice": {"type": "tool", "name": "dig"}, "max_tokens": 60}
    found = post(body).json()
    assert found["stop_reason"] == "tool_use"
    [call] = [block for block in found["content"] if block["type"] == "tool_use"]
    assert call["name"] == "dig"
    assert isinstance(call["input"]["deep"], bool)
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": "gold"}
    talk = [
        *TALK,
        {"role": "assistant", "content": found["content"]},
        {"role": "user", "content": [result, {"type": "text", "text": "What?"}]},
    ]
    answer = post({"messages": talk, "tools": [DIG], "tool_choice": {"type": "none"}})
    assert answer.json()["content"][0]["type"] == "text"


def test_system_and_blocks_are_part_of_the_prompt(post, lm):
    blocks = [{"type": "text", "text": "Be ", "cache_control": {"type": "ephemeral"}}]
    blocks.append({"type": "text", "text": "brief."})
    found = post({"system": blocks, "temperature": 0})
    talk = [{"role": "system", "content": "Be brief."}, *TALK]
    assert found.json()["content"][0]["text"] == alone(lm, talk, max_new_tokens=12)
    assert found.headers["x-paceline-ignored"] == "cache_control"


def test_a_schema_is_followed(post):
    form = {"type": "json_schema", "schema": {"enum": [7, 8]}}
    found = post({"output_config": {"format": form}}).json()
    assert found["content"][0]["text"] in ("7", "8")


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://a"}}


@pytest.mark.parametrize(
    ("body", "status", "kind", "message"),
    [
        ({"model": "other"}, 404, "not_found_error", "only 'tiny'"),
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"colour": 1}, 400, "invalid_request_error", "colour"),
        (
            {"messages": [{"role": "user", "content": [IMAGE]}]},
            400,
            "invalid_request_error",
            "no images",
        ),
        ({"tool_choice": {"type": "tool"}}, 400, "invalid_request_error", "needs a name"),
        (
            {"messages": [{"role": "user", "content": [{**DIG, "type": "tool_use", "id": "a"}]}]},
            400,
            "invalid_request_error",
            "input",
        ),
    ],
)
def test_errors_have_the_form_of_the_api(post, body, status, kind, message):
    found = post(body)
    assert found.status_code == status
    assert found.json()["type"] == "error"
    assert found.json()["error"]["type"] == kind
    assert message in found.json()["error"]["message"]
