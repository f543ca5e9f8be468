"""The package `openai`: chat completions and responses."""

import asyncio
import json

import openai
import pytest

from tests.clients.talk import (
    GET_WEATHER,
    MESSAGES,
    QUESTION,
    REPORT,
    TALE_MESSAGES,
    TOO_LONG,
    WEATHER,
    City,
)

FORCED = {"type": "function", "function": {"name": "get_weather"}}
RESPONSE_TOOL = {"type": "function", "strict": True, **GET_WEATHER["function"]}


@pytest.fixture
def options(server):
    return {"model": server.model, "temperature": 0}


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.base_url, api_key=server.key, max_retries=0) as found:
        yield found


def test_chat(client, options, plain, server):
    assert [model.id for model in client.models.list()] == [server.model]
    found = client.chat.completions.create(messages=MESSAGES, max_tokens=16, **options)
    assert found.choices[0].message.content == plain(messages=MESSAGES)["content"]
    assert found.usage.completion_tokens <= 16


def test_chat_without_blocking(server, options, plain):
    async def ask():
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key=server.key) as client:
            asked = [
                client.chat.completions.create(messages=MESSAGES, max_tokens=16, **options)
                for _ in range(2)
            ]
            return await asyncio.gather(*asked)

    texts = {found.choices[0].message.content for found in asyncio.run(ask())}
    assert texts == {plain(messages=MESSAGES)["content"]}


def test_stream(client, options, plain):
    usage = {"stream_options": {"include_usage": True}}
    with client.chat.completions.create(
        messages=TALE_MESSAGES, max_tokens=16, stream=True, **usage, **options
    ) as stream:
        chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == plain(messages=TALE_MESSAGES)["content"]
    assert chunks[-1].usage.total_tokens > 16


def test_structured_output(client, options):
    found = client.chat.completions.parse(
        messages=MESSAGES, response_format=City, max_tokens=40, **options
    )
    assert found.choices[0].message.parsed.name == "Paris"
    with client.chat.completions.stream(
        messages=MESSAGES, response_format=City, max_tokens=40, **options
    ) as stream:
        streamed = stream.get_final_completion()
    assert streamed.choices[0].message.parsed == found.choices[0].message.parsed


@pytest.mark.parametrize("dumped", [False, True])
def test_tools_with_a_round_trip(client, options, plain, dumped):
    messages = [{"role": "user", "content": WEATHER}]
    tools = {"tools": [GET_WEATHER], "max_tokens": 40}
    found = client.chat.completions.create(
        messages=messages, tool_choice=FORCED, **tools, **options
    )
    message = found.choices[0].message
    [call] = message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    messages.append(message.model_dump() if dumped else message)
    messages.append({"role": "tool", "tool_call_id": call.id, "content": REPORT})
    found = client.chat.completions.create(
        messages=messages, tool_choice="none", **tools, **options
    )
    answer = found.choices[0].message
    assert answer.content
    messages[1] = message.model_dump(include={"role", "content", "tool_calls"})
    assert answer.content == plain(messages=messages, tool_choice="none", **tools)["content"]


def test_tools_in_a_stream(client, options):
    with client.chat.completions.stream(
        messages=[{"role": "user", "content": WEATHER}],
        tools=[GET_WEATHER],
        tool_choice="required",
        max_tokens=40,
        **options,
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Paris"}


def test_responses(client, options, plain):
    found = client.responses.create(input=QUESTION, max_output_tokens=16, **options)
    assert found.output_text == plain(messages=MESSAGES)["content"]
    with client.responses.stream(input=QUESTION, max_output_tokens=16, **options) as stream:
        pieces = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert len(pieces) > 1
    assert "".join(pieces) == found.output_text
    parsed = client.responses.parse(
        input=QUESTION, text_format=City, max_output_tokens=40, **options
    )
    assert parsed.output_parsed.name == "Paris"


@pytest.mark.parametrize("dumped", [False, True])
def test_tools_of_responses_with_a_round_trip(client, options, dumped):
    talk = [{"role": "user", "content": WEATHER}]
    tools = {"tools": [RESPONSE_TOOL], "max_output_tokens": 40}
    found = client.responses.create(input=talk, tool_choice="required", **tools, **options)
    [call] = found.output
    assert json.loads(call.arguments) == {"city": "Paris"}
    talk += [item.model_dump() for item in found.output] if dumped else found.output
    talk.append({"type": "function_call_output", "call_id": call.call_id, "output": REPORT})
    assert client.responses.create(input=talk, tool_choice="none", **tools, **options).output_text


def test_errors(client, options, server):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(messages=[{"role": "user", "content": TOO_LONG}], **options)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="smollm2"):
        client.chat.completions.create(messages=MESSAGES, model="another")
    with pytest.raises(openai.NotFoundError, match="chat/completions"):
        client.embeddings.create(model=server.model, input="a")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
