"""`/v1/responses`: the next turn of a conversation, in OpenAI's newer shape; nothing is stored."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from itertools import count
from typing import Any

from fastapi import APIRouter, Request

from paceline.serving.api import formatting
from paceline.serving.api.collect import ChoiceCollector
from paceline.serving.api.dependencies import Here, client_of, named, opened
from paceline.serving.api.formatting import Choice
from paceline.serving.api.parse import chat_jobs
from paceline.serving.api.response_schemas import ResponseBody

router = APIRouter()
_Object = dict[str, Any]


@router.post("/v1/responses", response_model=None)
async def responses(body: ResponseBody, request: Request, here: Here) -> Any:
    """Answer in a conversation."""
    here.check_model(body.model)
    name, client = named("resp"), client_of(request, body.user)
    jobs = await asyncio.to_thread(chat_jobs, here.lm, body.as_chat(), name, client, here.limits)
    answering = await opened(here, request, jobs)
    shape = _ResponseBuilder(body, formatting.head(name, "response", here.name))
    if body.stream:
        return answering.streamed(_sse(_events(shape, answering)))
    await answering.finish(request, here.lm)
    return shape.response(answering.answers[0])


class _ResponseBuilder:
    """How an answer is told."""

    def __init__(self, body: ResponseBody, head: _Object) -> None:
        created = head.pop("created")
        said = body.model_dump(include={"instructions", "max_output_tokens", "temperature"})
        said |= body.model_dump(include={"top_p", "metadata", "user"})
        self._head = head | {"created_at": created, "error": None, "incomplete_details": None}
        self._head |= said | {
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "text": _dumped(body.text) or {"format": {"type": "text"}},
            "tool_choice": _dumped(body.tool_choice) or "auto",
            "tools": [_dumped(tool) for tool in body.tools or []],
            "truncation": "disabled",
        }
        self._id = head["id"]

    def response(self, answer: Choice) -> _Object:
        """The whole of it, as far as it has come."""
        found = self._head | {"status": self.status(answer), "output": [], "usage": None}
        if answer.last is None:
            return found
        usage = formatting.usage([answer])
        found["output"] = self.items(answer)
        found["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {
                "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
                "cache_write_tokens": 0,
            },
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
        found["paceline"] = formatting.speculation([answer])
        if found["status"] == "failed":
            found["error"] = {"code": "server_error", "message": answer.last.error}
        if found["status"] == "incomplete":
            why = "max_output_tokens" if answer.finish == "length" else answer.finish
            found["incomplete_details"] = {"reason": why}
        return found

    def status(self, answer: Choice) -> str:
        """How far it has come."""
        if answer.finish is None:
            return "in_progress"
        if answer.finish in ("stop", "tool_calls"):
            return "completed"
        return "failed" if answer.finish == "error" else "incomplete"

    def items(self, answer: Choice) -> list[_Object]:
        """A message, or the calls that it is."""
        calls = formatting.message(answer).get("tool_calls", [])
        if not calls:
            return [self.message(answer, self.status(answer), [_text(answer.text)])]
        return [
            {
                "type": "function_call",
                "id": f"fc_{call['id']}",
                "call_id": call["id"],
                "status": "completed",
                **call["function"],
            }
            for call in calls
        ]

    def message(self, answer: Choice, status: str, content: list[_Object]) -> _Object:
        """A turn of the assistant."""
        item = {"type": "message", "id": f"msg_{answer.job.id}", "status": status}
        return item | {"role": "assistant", "content": content}


async def _events(shape: _ResponseBuilder, answering: ChoiceCollector) -> AsyncIterator[_Object]:
    [answer] = answering.answers
    yield {"type": "response.created", "response": shape.response(answer)}
    yield {"type": "response.in_progress", "response": shape.response(answer)}
    # What may be a call is told whole: only its end says what it is.
    whole = answer.job.request.parser is not None
    opening = shape.message(answer, "in_progress", [])
    place = {"item_id": opening["id"], "output_index": 0, "content_index": 0}
    if not whole:
        yield {"type": "response.output_item.added", "output_index": 0, "item": opening}
        yield {"type": "response.content_part.added", **place, "part": _text("")}
    async for _, event in answering.events():
        if event.text and not whole:
            yield _delta(place, event.text)
    if whole and shape.items(answer)[0]["type"] == "function_call":
        for piece in _calls(shape.items(answer)):
            yield piece
    else:
        if whole:
            yield {"type": "response.output_item.added", "output_index": 0, "item": opening}
            yield {"type": "response.content_part.added", **place, "part": _text("")}
            yield _delta(place, answer.text)
        done = {"type": "response.output_text.done", **place}
        yield done | {"text": answer.text, "logprobs": []}
        yield {"type": "response.content_part.done", **place, "part": _text(answer.text)}
        [item] = shape.items(answer)
        yield {"type": "response.output_item.done", "output_index": 0, "item": item}
    yield {"type": f"response.{shape.status(answer)}", "response": shape.response(answer)}


def _calls(items: list[_Object]) -> list[_Object]:
    events: list[_Object] = []
    for index, item in enumerate(items):
        kind, place = "response.function_call_arguments", {"output_index": index}
        opening = item | {"arguments": "", "status": "in_progress"}
        said = place | {"item_id": item["id"]}
        events += [
            {"type": "response.output_item.added", **place, "item": opening},
            {"type": f"{kind}.delta", **said, "delta": item["arguments"]},
            {
                "type": f"{kind}.done",
                **said,
                "name": item["name"],
                "arguments": item["arguments"],
            },
            {"type": "response.output_item.done", **place, "item": item},
        ]
    return events


async def _sse(events: AsyncIterator[_Object]) -> AsyncIterator[str]:
    numbers = count()
    async for event in events:
        numbered = event | {"sequence_number": next(numbers)}
        yield f"event: {event['type']}\ndata: {json.dumps(numbered, ensure_ascii=False)}\n\n"


def _delta(place: _Object, text: str) -> _Object:
    return {"type": "response.output_text.delta", **place, "delta": text, "logprobs": []}


def _text(text: str) -> _Object:
    return {"type": "output_text", "text": text, "annotations": []}


def _dumped(value: Any) -> Any:
    """A part of the body as it came."""
    if hasattr(value, "model_dump"):
        return value.model_dump(by_alias=True, exclude_none=True)
    return value
