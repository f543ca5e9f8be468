"""`/v1/completions`: texts continued."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request

from paceline.lm import LM
from paceline.serving.api import replies
from paceline.serving.api.answering import Answering
from paceline.serving.api.asking import completion_asks
from paceline.serving.api.context import Context, Here, client_of, named, opened, told
from paceline.serving.api.replies import Answer
from paceline.serving.api.schemas import CompletionBody

router = APIRouter()


@router.post("/v1/completions", response_model=None)
async def completions(body: CompletionBody, request: Request, here: Here) -> Any:
    """Continue texts."""
    here.check_model(body.model)
    name, client = named("cmpl"), client_of(request, body.user)
    asked = await asyncio.to_thread(completion_asks, here.lm, body, name, client, here.limits)
    asks = [ask for each in asked for ask in each]
    answering = await opened(here, request, asks)
    heading = replies.head(name, "text_completion", here.name)
    if body.stream:
        echoes = [_echo(body, answer, here.lm) for answer in answering.answers]
        pieces = _pieces(body, here, heading, answering, echoes)
        return answering.streamed(replies.sse(pieces))
    passes = await answering.finish(request, here.lm, body.trace)
    found = reply(body, heading, answering.answers, len(asked), here.lm)
    found["paceline"] |= passes
    return found


def reply(
    body: CompletionBody, heading: dict[str, Any], answers: Sequence[Answer], prompts: int, lm: LM
) -> dict[str, Any]:
    """The whole answer, of answers that are over."""
    choices = []
    for place, answer in enumerate(replies.best(answers, prompts, body.n or 1)):
        shown = _choice(answer, _echo(body, answer, lm) + answer.text) | {"index": place}
        if body.logprobs is not None:
            shown["logprobs"] = replies.completion_logprobs(answer, lm)
        choices.append(shown)
    return heading | {
        "choices": choices,
        "usage": replies.usage(answers),
        "paceline": replies.speculation(answers),
    }


async def _pieces(
    body: CompletionBody,
    here: Context,
    heading: dict[str, Any],
    answering: Answering,
    echoes: Sequence[str],
) -> AsyncIterator[dict[str, Any]]:
    for answer, echo in zip(answering.answers, echoes, strict=True):
        if echo:
            yield heading | {"choices": [_choice(answer, echo)]}
    async for answer, event in answering.events():
        if event.text or event.finish or event.logprobs or body.trace:
            shown = _choice(answer, event.text)
            if event.logprobs:
                part = Answer(answer.ask, 0, logprobs=event.logprobs)
                shown["logprobs"] = replies.completion_logprobs(part, here.lm)
            yield told(heading | {"choices": [shown]}, body.trace, event, here.lm)
    if body.stream_options and body.stream_options.include_usage:
        yield heading | {"choices": [], "usage": replies.usage(answering.answers)}


def _echo(body: CompletionBody, answer: Answer, lm: LM) -> str:
    return lm.tokenizer.decode(answer.ask.request.prompt) if body.echo else ""


def _choice(answer: Answer, text: str) -> dict[str, Any]:
    finish = answer.finish
    return {"index": answer.index, "text": text, "logprobs": None, "finish_reason": finish}
