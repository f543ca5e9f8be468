"""Where a body is wrong is told by the path of its fields, and null is "not given" everywhere."""

import httpx2 as httpx
import pytest

TALK = [{"role": "user", "content": "Hi"}]
PATHS = {
    "/v1/completions": {"prompt": "Hi", "max_tokens": 1},
    "/v1/chat/completions": {"messages": TALK, "max_tokens": 1},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 1},
}


def send(address, path, **more):
    return httpx.post(f"{address}{path}", json={**PATHS[path], **more}, timeout=60)


@pytest.mark.parametrize("path", PATHS)
def test_null_is_not_given_whatever_the_field(address, path):
    fields = ("functions", "echo", "n", "documents", "never_heard_of", "Strange", "guided_backend")
    done = send(address, path, **dict.fromkeys(fields))
    assert done.status_code == 200
    refused = send(address, path, never_heard_of=0)
    assert refused.json()["error"]["param"] == "never_heard_of"


CALL = {"id": "a", "type": "function"}
TAKEN = [
    {"role": "assistant", "content": None, "tool_calls": [CALL | {"function": {"name": "f"}}]},
    {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": None}}]},
    {
        "role": "assistant",
        "tool_calls": [CALL | {"function": {"name": "f", "arguments": {"a": 1}}}],
    },
    {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    {"role": "user", "content": [{"type": "text", "text": None}, {"type": "text", "text": "a"}]},
    {"role": "assistant", "content": "a", "prefix": None, "weight": None},
]


@pytest.mark.parametrize("message", TAKEN)
def test_messages_as_clients_keep_them_are_taken(address, message):
    done = send(address, "/v1/chat/completions", messages=[*TALK, message, *TALK])
    assert done.status_code == 200, done.text


def test_items_as_clients_keep_them_are_taken(address):
    said = {"type": "message", "role": "user", "content": "Hi"}
    items = [
        {"type": "message", "role": "assistant", "content": None},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": None},
        {"type": "function_call_output", "call_id": "a", "output": None},
    ]
    done = send(address, "/v1/responses", input=[said, *items, said])
    assert done.status_code == 200, done.text


def messages(content):
    return {"messages": [{"role": "user", "content": content}]}


CHAT, RESPONSES, COMPLETIONS = "/v1/chat/completions", "/v1/responses", "/v1/completions"
KINDS = "'message', 'function_call', 'function_call_output', 'reasoning'"
FAULTS = [
    (CHAT, messages(3), "messages.0.content", "Input should be a valid string or a valid list"),
    (CHAT, messages([{"type": "text", "text": 3}]), "messages.0.content.0.text",
     "Input should be a valid string"),
    (CHAT, messages([{"type": "text"}]), "messages.0.content.0.text", "Field required"),
    (CHAT, messages([{"type": "image_url"}]), "messages.0.content",
     "this model reads text only, no images; leave image_url out"),
    (CHAT, messages([{"type": "text", "text": "a", "Foo": 1}]), "messages.0.content.0.Foo",
     "is not a parameter of this server"),
    (CHAT, {"Temperature": 1}, "Temperature", "is not a parameter of this server"),
    (CHAT, {"stop": [1]}, "stop.0", "Input should be a valid string"),
    (CHAT, {"tool_choice": {"type": "custom"}}, "tool_choice.type",
     "Input should be 'function' or 'allowed_tools'"),
    (CHAT, {"sampler": {"a": {"b": "c"}}}, "sampler.a.b", "Input should be a valid number"),
    (COMPLETIONS, {"prompt": [[1], ["a"]]}, "prompt.1.0", "Input should be a valid integer"),
    (RESPONSES, {"input": [{"type": "nope"}]}, "input.0",
     f"is of the type 'nope', expected {KINDS}"),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_text", "text": 3}]}]},
     "input.0.content.0.text", "Input should be a valid string"),
    (RESPONSES, {"input": [{"type": "function_call", "name": "f"}]}, "input.0.call_id",
     "Field required"),
    (RESPONSES, {"tools": [{"type": "web_search"}]}, "tools.0.type",
     "Input should be 'function'"),
    (RESPONSES, {"background": True}, "background",
     "this server stores no responses; send the whole conversation"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "param", "reason"), FAULTS)
def test_a_fault_is_told_by_the_path_of_its_field(address, path, body, param, reason):
    done = send(address, path, **body)
    assert done.status_code == 400
    error = done.json()["error"]
    assert (error["param"], error["message"]) == (param, f"{param}: {reason}")


def test_what_is_no_json_is_told_as_such(address):
    done = httpx.post(f"{address}{CHAT}", content=b'{"messages": [}')
    error = done.json()["error"]
    assert done.status_code == 400
    assert error["message"].startswith("the body: is not JSON: ")
