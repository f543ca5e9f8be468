"""pydantic-ai: agents over chat completions and over responses."""

import asyncio

import pytest

from tests.clients import NOT_HERE
from tests.clients.talk import (
    MESSAGES,
    QUESTION,
    REPORT,
    TALE,
    TALE_MESSAGES,
    TOO_LONG,
    WEATHER,
    City,
    get_weather,
)

pytest.importorskip("pydantic_ai", reason=NOT_HERE)

from pydantic_ai import Agent, ModelHTTPError, NativeOutput, ToolOutput
from pydantic_ai.messages import ToolReturnPart
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


@pytest.fixture(params=[OpenAIChatModel, OpenAIResponsesModel], ids=["chat", "responses"])
def agent(request, server):
    def agent(max_tokens=16, tool_choice=None, key=server.key, **options):
        def settings(context):
            chosen = tool_choice(context) if tool_choice else {}
            return {"temperature": 0, "max_tokens": max_tokens, **chosen}

        provider = OpenAIProvider(base_url=server.base_url, api_key=key)
        return Agent(
            request.param(server.model, provider=provider),
            model_settings=settings,
            retries=0,
            **options,
        )

    return agent


def test_chat(agent, plain):
    found = agent().run_sync(QUESTION)
    assert found.output == plain(messages=MESSAGES)["content"]
    more = agent().run_sync("And of Spain?", message_history=found.all_messages())
    talk = [*MESSAGES, {"role": "assistant", "content": found.output}]
    talk.append({"role": "user", "content": "And of Spain?"})
    assert more.output == plain(messages=talk)["content"]


def test_stream(agent, plain):
    async def ask():
        async with agent().run_stream(TALE) as stream:
            return [piece async for piece in stream.stream_text(delta=True, debounce_by=None)]

    pieces = asyncio.run(ask())
    assert len(pieces) > 1
    assert "".join(pieces) == plain(messages=TALE_MESSAGES)["content"]


@pytest.mark.parametrize("form", [NativeOutput, ToolOutput])
def test_structured_output(agent, form):
    assert agent(60, output_type=form(City)).run_sync(QUESTION).output.name == "Paris"


def test_tools_with_a_round_trip(agent):
    def settings(context):
        return {"tool_choice": "required" if context.run_step == 1 else "none"}

    made = agent(60, settings)
    made.tool_plain(strict=True)(get_weather)
    found = made.run_sync(WEATHER)
    [result] = [
        part
        for message in found.all_messages()
        for part in message.parts
        if isinstance(part, ToolReturnPart)
    ]
    assert (result.tool_name, result.content) == ("get_weather", REPORT)
    assert found.output
    assert found.usage.requests == 2


def test_errors(agent, server):
    with pytest.raises(ModelHTTPError, match="shorten") as caught:
        agent().run_sync(TOO_LONG)
    assert caught.value.status_code == 400
    with pytest.raises(ModelHTTPError) as caught:
        agent(key="wrong").run_sync(QUESTION)
    assert caught.value.status_code == 401
