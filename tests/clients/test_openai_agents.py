"""OpenAI's Agents SDK, over its default `/v1/responses` and over chat completions."""

import asyncio
from typing import Literal

import openai
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
)

STOP = {"stop": [","]}  # the SDK takes no answer that was cut
agents = pytest.importorskip("agents", reason=NOT_HERE)


@pytest.fixture(
    params=["OpenAIResponsesModel", "OpenAIChatCompletionsModel"], ids=["responses", "chat"]
)
def agent(request, server):
    agents.set_tracing_disabled(True)

    def agent(max_tokens=16, key=server.key, settings=None, **options):
        client = openai.AsyncOpenAI(base_url=server.base_url, api_key=key, max_retries=0)
        return agents.Agent(
            name="helper",
            model=getattr(agents, request.param)(server.model, openai_client=client),
            model_settings=agents.ModelSettings(
                temperature=0, max_tokens=max_tokens, **(settings or {})
            ),
            **options,
        )

    return agent


def test_chat(agent, plain):
    found = agents.Runner.run_sync(agent(), QUESTION)
    assert found.final_output == plain(messages=MESSAGES)["content"]
    more = [*found.to_input_list(), {"role": "user", "content": "And of Spain?"}]
    talk = [
        *MESSAGES,
        {"role": "assistant", "content": found.final_output},
        {"role": "user", "content": "And of Spain?"},
    ]
    assert agents.Runner.run_sync(agent(), more).final_output == plain(messages=talk)["content"]


def test_stream(agent, plain):
    async def ask():
        made = agent(60, settings={"extra_body": STOP})
        events = agents.Runner.run_streamed(made, TALE).stream_events()
        return [
            event.data.delta
            async for event in events
            if getattr(getattr(event, "data", None), "type", "") == "response.output_text.delta"
        ]

    pieces = asyncio.run(ask())
    assert len(pieces) > 1
    assert "".join(pieces) == plain(messages=TALE_MESSAGES, **STOP)["content"]


def test_structured_output(agent):
    assert (
        agents.Runner.run_sync(agent(60, output_type=City), QUESTION).final_output.name == "Paris"
    )


def test_tools_with_a_round_trip(agent):
    asked = []

    # Once, or a small model would call it again.
    @agents.function_tool(is_enabled=lambda *_: not asked)
    def get_weather(city: Literal["Paris"]) -> str:
        """Get the weather of a city."""
        asked.append(city)
        return REPORT

    made = agent(40, tools=[get_weather], settings={"tool_choice": "required", "verbosity": "low"})
    found = agents.Runner.run_sync(made, WEATHER, max_turns=3)
    assert asked == ["Paris"]
    assert [item.output for item in found.new_items if item.type == "tool_call_output_item"] == [
        REPORT
    ]
    assert found.final_output


def test_errors(agent):
    with pytest.raises(openai.BadRequestError, match="shorten"):
        agents.Runner.run_sync(agent(), TOO_LONG)
    with pytest.raises(openai.AuthenticationError):
        agents.Runner.run_sync(agent(key="wrong"), QUESTION)
