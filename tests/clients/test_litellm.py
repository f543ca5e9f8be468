"""LiteLLM: its providers for OpenAI's, vLLM's, Ollama's and Anthropic's servers."""

import asyncio
import json

import pytest

from tests.clients import NOT_HERE
from tests.clients.talk import (
    GET_WEATHER,
    MESSAGES,
    REPORT,
    TALE_MESSAGES,
    TOO_LONG,
    WEATHER,
    City,
)

with pytest.MonkeyPatch.context() as patch:
    patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network
    litellm = pytest.importorskip("litellm", reason=NOT_HERE)

FORCED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture
def completion(server):
    def completion(messages, provider="hosted_vllm", **options):
        ends = {"api_base": server.base_url, "api_key": server.key, "num_retries": 0}
        defaults = {"temperature": 0, "max_tokens": 16}
        model = f"{provider}/{server.model}"
        return litellm.completion(model=model, messages=messages, **ends | defaults | options)

    return completion


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "ollama_chat", "anthropic"])
def test_chat(completion, plain, server, provider):
    at_root = provider in ("ollama_chat", "anthropic")
    ends = {"api_base": server.address} if at_root else {}
    found = completion(MESSAGES, provider, **ends)
    assert found.choices[0].message.content == plain(messages=MESSAGES)["content"]
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in completion(MESSAGES, provider, stream=True, **ends)
    ]
    assert "".join(pieces) == found.choices[0].message.content


def test_stream(completion, plain):
    chunks = completion(TALE_MESSAGES, stream=True, stream_options={"include_usage": True})
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == plain(messages=TALE_MESSAGES)["content"]


def test_an_effort_changes_nothing(completion, plain):
    found = completion(
        MESSAGES, "openai", reasoning_effort="low", allowed_openai_params=["reasoning_effort"]
    )
    assert found.choices[0].message.content == plain(messages=MESSAGES)["content"]


def test_structured_output(completion):
    found = completion(MESSAGES, response_format=City, max_tokens=60)
    assert City.model_validate_json(found.choices[0].message.content).name == "Paris"


def test_tools_with_a_round_trip(completion, plain):
    messages = [{"role": "user", "content": WEATHER}]
    options = {"tools": [GET_WEATHER], "max_tokens": 40}
    message = completion(messages, tool_choice=FORCED, **options).choices[0].message
    [call] = message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": REPORT}]
    answer = completion(messages, tool_choice="none", **options).choices[0].message.content
    messages[1] = message.model_dump(include={"role", "content", "tool_calls"})
    assert answer == plain(messages=messages, tool_choice="none", **options)["content"]


@pytest.mark.parametrize("provider", ["hosted_vllm", "openai", "anthropic"])
def test_its_bridge_from_anthropic(server, plain, provider):
    tool = {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "input_schema": GET_WEATHER["function"]["parameters"],
    }
    api_base = server.address if provider == "anthropic" else server.base_url

    def create(messages, **options):
        return asyncio.run(
            litellm.anthropic.messages.acreate(
                model=f"{provider}/{server.model}",
                messages=messages,
                api_base=api_base,
                api_key=server.key,
                temperature=0,
                **{"max_tokens": 16} | options,
            )
        )

    assert create(MESSAGES)["content"][0]["text"] == plain(messages=MESSAGES)["content"]
    talk = [{"role": "user", "content": WEATHER}]
    choice = {"type": "tool", "name": "get_weather"}
    found = create(talk, tools=[tool], tool_choice=choice, max_tokens=40)
    [use] = [block for block in found["content"] if block["type"] == "tool_use"]
    assert use["input"] == {"city": "Paris"}
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": REPORT}
    talk += [
        {"role": "assistant", "content": found["content"]},
        {"role": "user", "content": [result]},
    ]
    assert create(talk, tools=[tool])["content"]


def test_errors(completion, server):
    with pytest.raises(litellm.ContextWindowExceededError):
        completion([{"role": "user", "content": TOO_LONG}])
    with pytest.raises(litellm.AuthenticationError):
        completion(MESSAGES, "openai", api_key="wrong")
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(
            model="hosted_vllm/another",
            messages=MESSAGES,
            api_base=server.base_url,
            api_key=server.key,
        )
