"""`/v1/chat/completions`: the next turn of a conversation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

from paceline.serving.api import formatting
from paceline.serving.api.collect import ChoiceCollector
from paceline.serving.api.dependencies import Dependencies, Here, client_of, named, opened, told
from paceline.serving.api.formatting import Choice
from paceline.serving.api.parse import chat_jobs
from paceline.serving.api.schemas import ChatBody

if TYPE_CHECKING:
    from paceline.lm import LM

router = APIRouter()


@router.post("/v1/chat/completions", response_model=None)
async def chat(body: ChatBody, request: Request, here: Here) -> Any:
    """Answer in a conversation."""
    here.check_model(body.model)
    name, client = named("chatcmpl"), client_of(request, body.user)
    jobs = await asyncio.to_thread(chat_jobs, here.lm, body, name, client, here.limits)
    answering = await opened(here, request, jobs)
    if body.stream:
        heading = formatting.head(name, "chat.completion.chunk", here.name)
        pieces = _pieces(body, here, heading, answering)
        return answering.streamed(formatting.sse(pieces))
    passes = await answering.finish(request, here.lm, body.trace)
    found = reply(
        body, formatting.head(name, "chat.completion", here.name), answering.answers, here.lm
    )
    found["paceline"] |= passes
    return found


def reply(
    body: ChatBody, heading: dict[str, Any], answers: Sequence[Choice], lm: LM
) -> dict[str, Any]:
    """The whole answer, of answers that are over."""
    choices = []
    for place, answer in enumerate(formatting.best(answers, 1, body.n or 1)):
        logprobs = formatting.chat_logprobs(answer.logprobs, lm) if body.logprobs else None
        shown = {"index": place, "message": formatting.message(answer), "logprobs": logprobs}
        choices.append(shown | {"finish_reason": answer.finish})
    return heading | {
        "choices": choices,
        "usage": formatting.usage(answers),
        "paceline": formatting.speculation(answers),
    }


async def _pieces(
    body: ChatBody,
    here: Dependencies,
    heading: dict[str, Any],
    answering: ChoiceCollector,
) -> AsyncIterator[dict[str, Any]]:
    for answer in answering.answers:
        yield heading | {"choices": [_delta(answer, {"role": "assistant", "content": ""})]}
    async for answer, event in answering.events():
        change: dict[str, Any] = {"content": event.text} if event.text else {}
        if answer.job.request.parser:  # a call is told whole, or not at all
            change = _whole(answer) if event.finish else {}
        if change or event.finish or event.logprobs or body.trace:
            shown = _delta(answer, change)
            if event.logprobs:
                shown["logprobs"] = formatting.chat_logprobs(event.logprobs, here.lm)
            yield told(heading | {"choices": [shown]}, body.trace, event, here.lm)
    if body.stream_options and body.stream_options.include_usage:
        yield heading | {"choices": [], "usage": formatting.usage(answering.answers)}


def _delta(answer: Choice, change: dict[str, Any]) -> dict[str, Any]:
    finish = answer.finish
    return {"index": answer.index, "delta": change, "logprobs": None, "finish_reason": finish}


def _whole(answer: Choice) -> dict[str, Any]:
    calls = formatting.message(answer).get("tool_calls")
    if not calls:
        return {"content": answer.text}
    return {"tool_calls": [{"index": place} | call for place, call in enumerate(calls)]}
