"""LangChain: `ChatOpenAI` over chat completions and over responses."""

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
    get_weather,
)

pytest.importorskip("langchain_openai", reason=NOT_HERE)

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI


@pytest.fixture(params=[False, True], ids=["chat", "responses"])
def responses(request):
    return request.param


@pytest.fixture
def chat(server, responses):
    def chat(max_tokens=16, **options):
        return ChatOpenAI(
            base_url=server.base_url,
            api_key=server.key,
            model=server.model,
            temperature=0,
            max_tokens=max_tokens,
            max_retries=0,
            use_responses_api=responses,
            **options,
        )

    return chat


def test_chat(chat, plain):
    found = chat().invoke(QUESTION)
    assert found.text == plain(messages=MESSAGES)["content"]
    assert found.usage_metadata["output_tokens"] <= 16


def test_stream(chat, plain):
    pieces = [piece.text for piece in chat().stream(TALE)]
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == plain(messages=TALE_MESSAGES)["content"]


def test_completions(server):
    llm = OpenAI(base_url=server.base_url, api_key=server.key, model=server.model, max_tokens=8)
    assert llm.invoke("The capital of France is")
    assert "".join(llm.stream("The capital of France is"))


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat, method):
    found = chat(60).with_structured_output(City, method=method).invoke(QUESTION)
    assert found.name == "Paris"


def test_tools_with_a_round_trip(chat, plain):
    tools = [tool(get_weather)]
    question = HumanMessage(WEATHER)
    message = chat(60).bind_tools(tools, tool_choice="get_weather", strict=True).invoke([question])
    [call] = message.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    result = tools[0].invoke(call)
    assert isinstance(result, ToolMessage)
    assert result.content == REPORT
    found = chat(16).bind_tools(tools, tool_choice="none").invoke([question, message, result])
    function = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    talk = [
        {"role": "user", "content": WEATHER},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": call["id"], "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": call["id"], "content": REPORT},
    ]
    assert found.text == plain(messages=talk)["content"]


def test_errors(chat, server):
    with pytest.raises(openai.BadRequestError, match="shorten"):
        chat().invoke(TOO_LONG)
    with pytest.raises(openai.AuthenticationError):
        ChatOpenAI(base_url=server.base_url, api_key="wrong", model=server.model).invoke("Hi")
