"""`/v1/messages`: the next message of a conversation, in the format of Anthropic's API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import APIRouter, Request

from paceline.serving.api.collect import ChoiceCollector
from paceline.serving.api.dependencies import Here, client_of, new_id, submit_jobs
from paceline.serving.api.error_forms import anthropic_error
from paceline.serving.api.errors import error_body
from paceline.serving.api.formatting import Choice
from paceline.serving.api.messages_schemas import CountBody, MessagesBody
from paceline.serving.api.parse import chat_jobs

router = APIRouter()
_Object = dict[str, Any]
_TEXTS = {"reasoning": "thinking", "content": "text"}  # of `Choice` -> type of the block
_EMPTY: dict[str, _Object] = {
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
    "text": {"type": "text", "text": ""},
}
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


@router.post("/v1/messages", response_model=None)
async def messages(body: MessagesBody, request: Request, here: Here) -> Any:
    """Answer the last message of a conversation, as Anthropic's API does."""
    here.check_model(body.model)
    name, client = new_id("msg"), client_of(request, body.client)
    jobs = await asyncio.to_thread(chat_jobs, here.lm, body.as_chat(), name, client, here.limits)
    collector = await submit_jobs(here, request, jobs)
    head = {"id": name, "type": "message", "role": "assistant", "model": here.name}
    if body.stream:
        return collector.streamed(_sse(_events(head, collector)), _failed)
    await collector.finish(request, here.lm)
    [choice] = collector.choices
    return head | {"content": _blocks(choice), **_stop(choice), "usage": _usage(choice)}


@router.post("/v1/messages/count_tokens", response_model=None)
async def count_tokens(body: CountBody, here: Here) -> dict[str, int]:
    """Return the number of tokens of a conversation's prompt."""
    here.check_model(body.model)
    jobs = await asyncio.to_thread(chat_jobs, here.lm, body.as_chat(), "count", "", here.limits)
    return {"input_tokens": len(jobs[0].request.prompt)}


def _blocks(choice: Choice) -> list[_Object]:
    """Return the content: reasoning, a text where there is any or no call, and calls of tools."""
    calls, content = choice.calls, choice.content
    thoughts = [_thinking(choice.reasoning)] if choice.reasoning else []
    texts = [{"type": "text", "text": content}] if content or not calls else []
    return [*thoughts, *texts, *map(_tool_use, calls)]


def _thinking(text: str) -> _Object:
    return {"type": "thinking", "thinking": text, "signature": ""}


def _tool_use(call: _Object) -> _Object:
    function = call["function"]
    try:
        value = json.loads(function["arguments"])
    except ValueError:
        value = function["arguments"]
    arguments = value if isinstance(value, dict) else {"value": value}
    return {"type": "tool_use", "id": call["id"], "name": function["name"], "input": arguments}


def _stop(choice: Choice) -> _Object:
    """Return why the answer ended; nulls before its end."""
    finish, output = choice.finish, choice.last.output if choice.last else None
    reason = _STOP_REASONS.get(finish, finish) if finish else None
    sequence = output.stopped_by if output and finish == "stop" else ""
    if sequence:
        return {"stop_reason": "stop_sequence", "stop_sequence": sequence}
    return {"stop_reason": reason, "stop_sequence": None}


def _usage(choice: Choice) -> dict[str, int]:
    written = len(choice.tokens)
    return {"input_tokens": len(choice.job.request.prompt), "output_tokens": written}


async def _events(head: _Object, collector: ChoiceCollector) -> AsyncIterator[_Object]:
    [choice] = collector.choices
    opening = head | {"content": [], **_stop(choice), "usage": _usage(choice)}
    yield {"type": "message_start", "message": opening}
    sent = dict.fromkeys(_TEXTS, 0)  # characters
    open_blocks: list[str] = []  # those begun; the last one is not closed
    async for _, event in collector.events():
        if event.finish == "error":
            yield anthropic_error(event.error, 500)
            return
        for name, kind in _TEXTS.items():
            text = getattr(choice, name)[sent[name] :]
            if not text:
                continue
            if kind not in open_blocks:
                if open_blocks:
                    yield {"type": "content_block_stop", "index": len(open_blocks) - 1}
                yield _start(len(open_blocks), _EMPTY[kind])
                open_blocks.append(kind)
            yield _delta(len(open_blocks) - 1, {"type": f"{kind}_delta", kind: text})
            sent[name] += len(text)
    if open_blocks:
        yield {"type": "content_block_stop", "index": len(open_blocks) - 1}
    for index, block in enumerate(_blocks(choice)):
        if block["type"] not in open_blocks:
            for piece in _whole(index, block):
                yield piece
    yield {"type": "message_delta", "delta": _stop(choice), "usage": _usage(choice)}
    yield {"type": "message_stop"}


def _whole(index: int, block: _Object) -> Iterator[_Object]:
    """Yield the events of a block that is complete: a call, or the empty text."""
    if block["type"] == "tool_use":
        arguments = json.dumps(block["input"], ensure_ascii=False)
        yield _start(index, block | {"input": {}})
        yield _delta(index, {"type": "input_json_delta", "partial_json": arguments})
    else:
        yield _start(index, block)
    yield {"type": "content_block_stop", "index": index}


def _start(index: int, block: _Object) -> _Object:
    return {"type": "content_block_start", "index": index, "content_block": block}


def _delta(index: int, delta: _Object) -> _Object:
    return {"type": "content_block_delta", "index": index, "delta": delta}


async def _sse(events: AsyncIterator[_Object]) -> AsyncIterator[str]:
    async for event in events:
        yield _event(event)


def _event(event: _Object) -> str:
    return f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n"


def _failed(error: Exception) -> str:
    """Return the event that ends a stream which fails on its way."""
    found = error_body(error)["error"]
    return _event(
        anthropic_error(found["message"], 500 if found["type"] == "server_error" else 400)
    )
