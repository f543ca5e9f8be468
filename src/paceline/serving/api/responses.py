"""`/v1/responses`: the next message of a conversation, in OpenAI's newer format."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

from paceline.serving.api import formatting
from paceline.serving.api.collect import ChoiceCollector
from paceline.serving.api.dependencies import Here, client_of, new_id, submit_jobs
from paceline.serving.api.formatting import Choice
from paceline.serving.api.logprobs import TokenTexts, chat_logprobs, texts_of
from paceline.serving.api.parse import chat_jobs
from paceline.serving.api.response_schemas import ResponseBody
from paceline.serving.messages import Logprob

if TYPE_CHECKING:
    from paceline.lm import LM

router = APIRouter()
_Object = dict[str, Any]


@router.post("/v1/responses", response_model=None)
async def responses(body: ResponseBody, request: Request, here: Here) -> Any:
    """Answer the last message of a conversation."""
    here.check_model(body.model)
    name, client = new_id("resp"), client_of(request, body.user)
    jobs = await asyncio.to_thread(chat_jobs, here.lm, body.as_chat(), name, client, here.limits)
    collector = await submit_jobs(here, request, jobs)
    builder = _ResponseBuilder(body, formatting.head(name, "response", here.name), here.lm)
    if body.stream:
        return collector.streamed(_sse(_events(builder, collector)))
    await collector.finish(request, here.lm)
    return builder.response(collector.choices[0])


class _ResponseBuilder:
    """Builds the response objects of one request."""

    def __init__(self, body: ResponseBody, head: _Object, lm: LM) -> None:
        created = head.pop("created")
        fields = body.model_dump(include={"instructions", "max_output_tokens", "temperature"})
        fields |= body.model_dump(include={"top_p", "metadata", "user"})
        self._head = head | {"created_at": created, "error": None, "incomplete_details": None}
        self._head |= fields | {
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "text": _dumped(body.text) or {"format": {"type": "text"}},
            "tool_choice": _dumped(body.tool_choice) or "auto",
            "tools": [_dumped(tool) for tool in body.tools or []],
            "truncation": "disabled",
        }
        self._id = head["id"]
        self._lm = lm
        self._logprobs = body.logprobs

    def response(self, choice: Choice) -> _Object:
        """Return the response as far as it has come."""
        response = self._head | {"status": self.status(choice), "output": [], "usage": None}
        if choice.last is None:
            return response
        usage = formatting.usage([choice])
        response["output"] = self.items(choice)
        response["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {
                "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
                "cache_write_tokens": 0,
            },
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
        response["paceline"] = formatting.speculation([choice])
        if response["status"] == "failed":
            response["error"] = {"code": "server_error", "message": choice.last.error}
        if response["status"] == "incomplete":
            why = "max_output_tokens" if choice.finish == "length" else choice.finish
            response["incomplete_details"] = {"reason": why}
        return response

    def status(self, choice: Choice) -> str:
        """Return its status."""
        if choice.finish is None:
            return "in_progress"
        if choice.finish in ("stop", "tool_calls"):
            return "completed"
        return "failed" if choice.finish == "error" else "incomplete"

    def items(self, choice: Choice) -> list[_Object]:
        """Return the output: a message where there is text or nothing else, then tool calls."""
        message = formatting.message(choice)
        calls, content = message.get("tool_calls", []), message["content"] or ""
        items = []
        if content or not calls:
            part = _text(content)
            if texts := self.texts(choice):
                part["logprobs"] = _logprobs(choice.logprobs, texts)
            items.append(self.message(choice, self.status(choice), [part]))
        return items + [
            {
                "type": "function_call",
                "id": f"fc_{call['id']}",
                "call_id": call["id"],
                "status": "completed",
                **call["function"],
            }
            for call in calls
        ]

    def texts(self, choice: Choice) -> TokenTexts | None:
        """Return the texts of an answer's tokens; None if no log-probabilities are requested."""
        return texts_of(choice.job.request, self._lm) if self._logprobs else None

    def message(self, choice: Choice, status: str, content: list[_Object]) -> _Object:
        """Return the assistant's message."""
        item = {"type": "message", "id": f"msg_{choice.job.id}", "status": status}
        return item | {"role": "assistant", "content": content}


async def _events(builder: _ResponseBuilder, collector: ChoiceCollector) -> AsyncIterator[_Object]:
    [choice] = collector.choices
    yield {"type": "response.created", "response": builder.response(choice)}
    yield {"type": "response.in_progress", "response": builder.response(choice)}
    opening = builder.message(choice, "in_progress", [])
    place = {"item_id": opening["id"], "output_index": 0, "content_index": 0}
    sent, texts, logprobs = 0, builder.texts(choice), list[Logprob]()
    async for _, event in collector.events():
        content = choice.content
        logprobs += event.logprobs
        if content and not sent:
            for piece in _opened(opening, place):
                yield piece
        if len(content) > sent:
            yield _delta(place, content[sent:], _logprobs(logprobs, texts) if texts else [])
            logprobs = []
        sent = max(sent, len(content))
    for index, item in enumerate(builder.items(choice)):
        if item["type"] == "function_call":
            for piece in _call(item, index):
                yield piece
            continue
        if not sent:
            for piece in _opened(opening, place):
                yield piece
        [part] = item["content"]
        done = {"type": "response.output_text.done", **place}
        yield done | {"text": part["text"], "logprobs": part.get("logprobs", [])}
        yield {"type": "response.content_part.done", **place, "part": part}
        yield {"type": "response.output_item.done", "output_index": index, "item": item}
    yield {"type": f"response.{builder.status(choice)}", "response": builder.response(choice)}


def _opened(opening: _Object, place: _Object) -> list[_Object]:
    """Return the events that begin a message."""
    return [
        {"type": "response.output_item.added", "output_index": 0, "item": opening},
        {"type": "response.content_part.added", **place, "part": _text("")},
    ]


def _call(item: _Object, index: int) -> list[_Object]:
    """Return the events of a tool call."""
    kind, place = "response.function_call_arguments", {"output_index": index}
    opening = item | {"arguments": "", "status": "in_progress"}
    address = place | {"item_id": item["id"]}
    return [
        {"type": "response.output_item.added", **place, "item": opening},
        {"type": f"{kind}.delta", **address, "delta": item["arguments"]},
        {"type": f"{kind}.done", **address, "name": item["name"], "arguments": item["arguments"]},
        {"type": "response.output_item.done", **place, "item": item},
    ]


async def _sse(events: AsyncIterator[_Object]) -> AsyncIterator[str]:
    numbers = count()
    async for event in events:
        numbered = event | {"sequence_number": next(numbers)}
        yield f"event: {event['type']}\ndata: {json.dumps(numbered, ensure_ascii=False)}\n\n"


def _delta(place: _Object, text: str, logprobs: list[_Object]) -> _Object:
    return {"type": "response.output_text.delta", **place, "delta": text, "logprobs": logprobs}


def _logprobs(logprobs: Sequence[Logprob], texts: TokenTexts) -> list[_Object]:
    content: list[_Object] = chat_logprobs(logprobs, texts)["content"]
    return content


def _text(text: str) -> _Object:
    return {"type": "output_text", "text": text, "annotations": []}


def _dumped(value: Any) -> Any:
    """Return a part of the body as it came."""
    if hasattr(value, "model_dump"):
        return value.model_dump(by_alias=True, exclude_none=True)
    return value
