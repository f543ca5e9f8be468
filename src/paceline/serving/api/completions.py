"""`/v1/completions`: continuations of texts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

from paceline.serving.api import formatting
from paceline.serving.api.collect import ChoiceCollector
from paceline.serving.api.dependencies import (
    Dependencies,
    Here,
    client_of,
    new_id,
    submit_jobs,
    with_details,
)
from paceline.serving.api.formatting import Choice
from paceline.serving.api.logprobs import TokenTexts, completion_logprobs, texts_of
from paceline.serving.api.parse import completion_jobs
from paceline.serving.api.prompt_logprobs import (
    check_whole,
    prompt_logprobs,
    with_fewer,
    with_prompt_scores,
)
from paceline.serving.api.schemas import CompletionBody

if TYPE_CHECKING:
    from paceline.lm import LM

router = APIRouter()


@router.post("/v1/completions", response_model=None)
async def completions(body: CompletionBody, request: Request, here: Here) -> Any:
    """Continue one or more texts."""
    here.check_model(body.model)
    echoed = body.echo and body.logprobs is not None
    if body.stream and (body.max_tokens == 0 or echoed or body.prompt_logprobs is not None):
        check_whole()
    name, client = new_id("cmpl"), client_of(request, body.user)
    jobs_by_prompt = await asyncio.to_thread(
        completion_jobs, here.lm, body, name, client, here.limits
    )
    jobs = [job for each in jobs_by_prompt for job in each]
    collector = await submit_jobs(here, request, jobs)
    heading = formatting.head(name, "text_completion", here.name)
    if body.stream:
        echoes = [_echo(body, choice, here.lm) for choice in collector.choices]
        pieces = _pieces(body, here, heading, collector, echoes)
        return collector.streamed(formatting.sse(pieces))
    passes = await collector.finish(request, here.lm, body.trace)
    response = reply(body, heading, collector.choices, len(jobs_by_prompt), here.lm)
    response["paceline"] |= passes
    return response


def reply(
    body: CompletionBody, heading: dict[str, Any], choices: Sequence[Choice], prompts: int, lm: LM
) -> dict[str, Any]:
    """Return the complete response for finished choices."""
    rendered = []
    choices = with_prompt_scores(choices)
    for index, choice in enumerate(formatting.best(choices, prompts, body.n or 1)):
        fields = _choice(choice, _echo(body, choice, lm) + choice.text) | {"index": index}
        if body.logprobs is not None:
            fields["logprobs"] = _logprobs(body, choice, lm)
        if body.return_token_ids:
            fields |= {"token_ids": choice.tokens}
            fields |= {"prompt_token_ids": list(choice.job.request.prompt)}
        if body.prompt_logprobs is not None:
            scores = prompt_logprobs(choice.prompt_logprobs, body.prompt_logprobs, lm)
            fields["prompt_logprobs"] = scores
        rendered.append(fields)
    return heading | {
        "choices": rendered,
        "usage": formatting.usage(choices),
        "paceline": formatting.speculation(choices),
    }


async def _pieces(
    body: CompletionBody,
    here: Dependencies,
    heading: dict[str, Any],
    collector: ChoiceCollector,
    echoes: Sequence[str],
) -> AsyncIterator[dict[str, Any]]:
    options = body.stream_options
    counted = options is not None and options.include_usage
    heading |= {"usage": None} if counted else {}
    for choice, echo in zip(collector.choices, echoes, strict=True):
        if echo:
            yield heading | {"choices": [_choice(choice, echo)]}
    choices = collector.choices if body.logprobs is not None else []
    texts = [texts_of(choice.job.request, here.lm) for choice in choices]
    async for choice, event in collector.events():
        ids = event.tokens if body.return_token_ids else []
        if event.text or event.finish or event.logprobs or body.trace or ids:
            fields = _choice(choice, event.text)
            if body.return_token_ids:
                fields["token_ids"] = ids
                if len(choice.tokens) == len(ids):  # the first piece
                    fields["prompt_token_ids"] = list(choice.job.request.prompt)
            if event.logprobs:
                fields["logprobs"] = completion_logprobs(event.logprobs, texts[choice.index])
            piece = heading | {"choices": [fields]}
            if options and options.continuous_usage_stats:
                piece["usage"] = formatting.usage(collector.choices)
            yield with_details(piece, body.trace, event, here.lm)
    if counted:
        yield heading | {"choices": [], "usage": formatting.usage(collector.choices)}


def _logprobs(body: CompletionBody, choice: Choice, lm: LM) -> dict[str, Any]:
    if not body.echo:
        return completion_logprobs(choice.logprobs, texts_of(choice.job.request, lm))
    texts = TokenTexts(lm, begins=True)
    prompt = with_fewer(choice.prompt_logprobs, body.logprobs or 0)
    return completion_logprobs([*prompt, *choice.logprobs], texts)


def _echo(body: CompletionBody, choice: Choice, lm: LM) -> str:
    return lm.tokenizer.decode(choice.job.request.prompt) if body.echo else ""


def _choice(choice: Choice, text: str) -> dict[str, Any]:
    finish = choice.finish
    return {"index": choice.index, "text": text, "logprobs": None, "finish_reason": finish}
