"""LlamaIndex: `OpenAILike`."""

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

pytest.importorskip("llama_index.llms.openai_like", reason=NOT_HERE)

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike


@pytest.fixture
def llm(server):
    def llm(max_tokens=16, **options):
        return OpenAILike(
            api_base=server.base_url,
            api_key=server.key,
            model=server.model,
            temperature=0,
            max_tokens=max_tokens,
            max_retries=0,
            context_window=8192,
            is_chat_model=True,
            is_function_calling_model=True,
            **options,
        )

    return llm


TALK = [ChatMessage(role="user", content=QUESTION)]


def test_chat(llm, plain):
    assert llm().chat(TALK).message.content == plain(messages=MESSAGES)["content"]
    assert llm().complete(QUESTION).text == plain(messages=MESSAGES)["content"]


def test_stream(llm, plain):
    pieces = [
        piece.delta or "" for piece in llm().stream_chat([ChatMessage(role="user", content=TALE)])
    ]
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == plain(messages=TALE_MESSAGES)["content"]


@pytest.mark.parametrize("as_schema", [False, True])
def test_structured_output(llm, as_schema):
    made = llm(60, should_use_structured_outputs=as_schema)
    found = made.structured_predict(City, PromptTemplate(QUESTION))
    assert found.name == "Paris"


def test_tools_with_a_round_trip(llm, plain):
    tool = FunctionTool.from_defaults(get_weather)
    question = ChatMessage(role="user", content=WEATHER)
    found = llm(60).chat_with_tools([tool], chat_history=[question], tool_required=True)
    [call] = llm().get_tool_calls_from_response(found)
    assert (call.tool_name, call.tool_kwargs) == ("get_weather", {"city": "Paris"})
    result = tool.call(**call.tool_kwargs).content
    assert result == REPORT
    told = ChatMessage(
        role="tool", content=result, additional_kwargs={"tool_call_id": call.tool_id}
    )
    answer = llm().chat([question, found.message, told]).message.content
    function = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    talk = [
        {"role": "user", "content": WEATHER},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": call.tool_id, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": call.tool_id, "content": REPORT},
    ]
    assert answer == plain(messages=talk)["content"]


def test_errors(llm):
    with pytest.raises(openai.BadRequestError, match="shorten"):
        llm().complete(TOO_LONG)
    made = llm()
    made.api_key = "wrong"
    with pytest.raises(openai.AuthenticationError):
        made.complete(QUESTION)
