"""`/v1/completions`: texts continued."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

from paceline.serving.api import formatting
from paceline.serving.api.collect import ChoiceCollector
from paceline.serving.api.dependencies import Dependencies, Here, client_of, named, opened, told
from paceline.serving.api.formatting import Choice
from paceline.serving.api.parse import completion_jobs
from paceline.serving.api.schemas import CompletionBody

if TYPE_CHECKING:
    from paceline.lm import LM

router = APIRouter()


@router.post("/v1/completions", response_model=None)
async def completions(body: CompletionBody, request: Request, here: Here) -> Any:
    """Continue texts."""
    here.check_model(body.model)
    name, client = named("cmpl"), client_of(request, body.user)
    asked = await asyncio.to_thread(completion_jobs, here.lm, body, name, client, here.limits)
    jobs = [job for each in asked for job in each]
    answering = await opened(here, request, jobs)
    heading = formatting.head(name, "text_completion", here.name)
    if body.stream:
        echoes = [_echo(body, answer, here.lm) for answer in answering.answers]
        pieces = _pieces(body, here, heading, answering, echoes)
        return answering.streamed(formatting.sse(pieces))
    passes = await answering.finish(request, here.lm, body.trace)
    found = reply(body, heading, answering.answers, len(asked), here.lm)
    found["paceline"] |= passes
    return found


def reply(
    body: CompletionBody, heading: dict[str, Any], answers: Sequence[Choice], prompts: int, lm: LM
) -> dict[str, Any]:
    """The whole answer, of answers that are over."""
    choices = []
    for place, answer in enumerate(formatting.best(answers, prompts, body.n or 1)):
        shown = _choice(answer, _echo(body, answer, lm) + answer.text) | {"index": place}
        if body.logprobs is not None:
            shown["logprobs"] = formatting.completion_logprobs(answer, lm)
        choices.append(shown)
    return heading | {
        "choices": choices,
        "usage": formatting.usage(answers),
        "paceline": formatting.speculation(answers),
    }


async def _pieces(
    body: CompletionBody,
    here: Dependencies,
    heading: dict[str, Any],
    answering: ChoiceCollector,
    echoes: Sequence[str],
) -> AsyncIterator[dict[str, Any]]:
    for answer, echo in zip(answering.answers, echoes, strict=True):
        if echo:
            yield heading | {"choices": [_choice(answer, echo)]}
    async for answer, event in answering.events():
        if event.text or event.finish or event.logprobs or body.trace:
            shown = _choice(answer, event.text)
            if event.logprobs:
                part = Choice(answer.job, 0, logprobs=event.logprobs)
                shown["logprobs"] = formatting.completion_logprobs(part, here.lm)
            yield told(heading | {"choices": [shown]}, body.trace, event, here.lm)
    if body.stream_options and body.stream_options.include_usage:
        yield heading | {"choices": [], "usage": formatting.usage(answering.answers)}


def _echo(body: CompletionBody, answer: Choice, lm: LM) -> str:
    return lm.tokenizer.decode(answer.job.request.prompt) if body.echo else ""


def _choice(answer: Choice, text: str) -> dict[str, Any]:
    finish = answer.finish
    return {"index": answer.index, "text": text, "logprobs": None, "finish_reason": finish}
