"""The package `anthropic`: `/v1/messages`."""

import pytest

from tests.clients import NOT_HERE
from tests.clients.talk import GET_WEATHER, MESSAGES, REPORT, TALE_MESSAGES, TOO_LONG, WEATHER, City

anthropic = pytest.importorskip("anthropic", reason=NOT_HERE)

TOOL = {
    "name": "get_weather",
    "description": "Get the weather of a city.",
    "input_schema": GET_WEATHER["function"]["parameters"],
}


@pytest.fixture
def client(server):
    with anthropic.Anthropic(base_url=server.address, api_key=server.key, max_retries=0) as found:
        yield found


@pytest.fixture
def options(server):
    return {"model": server.model, "max_tokens": 16, "extra_body": {"temperature": 0}}


def test_chat(client, options, plain, server):
    found = client.messages.create(messages=MESSAGES, **options)
    assert found.content[0].text == plain(messages=MESSAGES)["content"]
    counted = client.messages.count_tokens(messages=MESSAGES, model=server.model)
    assert counted.input_tokens == found.usage.input_tokens


def test_stream(client, options, plain):
    with client.messages.stream(messages=TALE_MESSAGES, **options) as stream:
        pieces = list(stream.text_stream)
    assert len(pieces) > 1
    assert "".join(pieces) == plain(messages=TALE_MESSAGES)["content"]


def test_structured_output(client, options):
    found = client.messages.parse(
        messages=MESSAGES, output_format=City, **options | {"max_tokens": 60}
    )
    assert found.parsed_output.name == "Paris"


def test_tools_with_a_round_trip(client, options, plain):
    talk = [{"role": "user", "content": WEATHER}]
    forced = {"type": "tool", "name": "get_weather"}
    longer = options | {"max_tokens": 40, "tools": [TOOL]}
    found = client.messages.create(messages=talk, tool_choice=forced, **longer)
    [use] = found.content
    assert use.input == {"city": "Paris"}
    result = {"type": "tool_result", "tool_use_id": use.id, "content": REPORT}
    talk += [
        {"role": "assistant", "content": found.content},
        {"role": "user", "content": [result]},
    ]
    answer = client.messages.create(messages=talk, tool_choice={"type": "none"}, **longer)
    function = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    same = [
        talk[0],
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": use.id, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": use.id, "content": REPORT},
    ]
    assert answer.content[0].text == plain(messages=same, max_tokens=40)["content"]


def test_errors(client, options, server):
    with pytest.raises(anthropic.BadRequestError, match="shorten"):
        client.messages.create(messages=[{"role": "user", "content": TOO_LONG}], **options)
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(messages=MESSAGES, **options | {"model": "another"})
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="wrong").messages.create(messages=MESSAGES, **options)
