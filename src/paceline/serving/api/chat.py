"""`/v1/chat/completions`: the next message of a conversation."""

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
from paceline.serving.api.logprobs import chat_logprobs, texts_of
from paceline.serving.api.parse import chat_jobs
from paceline.serving.api.prompt_logprobs import check_whole, prompt_logprobs, with_prompt_scores
from paceline.serving.api.schemas import ChatBody

if TYPE_CHECKING:
    from paceline.lm import LM

router = APIRouter()
_TEXTS = {"reasoning_content": "reasoning", "content": "content"}  # of a message -> of `Choice`


@router.post("/v1/chat/completions", response_model=None)
async def chat(body: ChatBody, request: Request, here: Here) -> Any:
    """Answer the last message of a conversation."""
    here.check_model(body.model)
    if body.stream and body.prompt_logprobs is not None:
        check_whole()
    name, client = new_id("chatcmpl"), client_of(request, body.user)
    jobs = await asyncio.to_thread(chat_jobs, here.lm, body, name, client, here.limits)
    collector = await submit_jobs(here, request, jobs)
    if body.stream:
        heading = formatting.head(name, "chat.completion.chunk", here.name)
        pieces = _pieces(body, here, heading, collector)
        return collector.streamed(formatting.sse(pieces))
    passes = await collector.finish(request, here.lm, body.trace)
    response = reply(
        body, formatting.head(name, "chat.completion", here.name), collector.choices, here.lm
    )
    response["paceline"] |= passes
    return response


def reply(
    body: ChatBody, heading: dict[str, Any], choices: Sequence[Choice], lm: LM
) -> dict[str, Any]:
    """Return the complete response for finished choices."""
    rendered = []
    choices = with_prompt_scores(choices)
    for index, choice in enumerate(formatting.best(choices, 1, body.n or 1)):
        logprobs = (
            chat_logprobs(choice.logprobs, texts_of(choice.job.request, lm))
            if body.logprobs
            else None
        )
        fields = {"index": index, "message": formatting.message(choice), "logprobs": logprobs}
        fields |= {"token_ids": choice.tokens} if body.return_token_ids else {}
        rendered.append(fields | {"finish_reason": choice.finish})
    if body.return_token_ids:
        heading |= {"prompt_token_ids": list(choices[0].job.request.prompt)}
    if body.prompt_logprobs is not None:
        scores = choices[0].prompt_logprobs
        heading |= {"prompt_logprobs": prompt_logprobs(scores, body.prompt_logprobs, lm)}
    return heading | {
        "choices": rendered,
        "usage": formatting.usage(choices),
        "paceline": formatting.speculation(choices),
    }


async def _pieces(
    body: ChatBody,
    here: Dependencies,
    heading: dict[str, Any],
    collector: ChoiceCollector,
) -> AsyncIterator[dict[str, Any]]:
    options = body.stream_options
    counted = options is not None and options.include_usage
    heading |= {"usage": None} if counted else {}
    choices = collector.choices if body.logprobs else []
    texts = [texts_of(choice.job.request, here.lm) for choice in choices]
    sent = [dict.fromkeys(_TEXTS, 0) for _ in collector.choices]  # characters
    for choice in collector.choices:
        opening = heading | {"choices": [_delta(choice, {"role": "assistant", "content": ""})]}
        if body.return_token_ids:
            opening["prompt_token_ids"] = list(choice.job.request.prompt)
        yield opening
    async for choice, event in collector.events():
        change = _new_texts(choice, sent[choice.index])
        if event.finish and (calls := choice.calls):  # sent whole
            change["tool_calls"] = [{"index": i} | call for i, call in enumerate(calls)]
        ids = event.tokens if body.return_token_ids else []
        if change or event.finish or event.logprobs or body.trace or ids:
            fields = _delta(choice, change)
            fields |= {"token_ids": ids} if body.return_token_ids else {}
            if event.logprobs:
                fields["logprobs"] = chat_logprobs(event.logprobs, texts[choice.index])
            piece = heading | {"choices": [fields]}
            if options and options.continuous_usage_stats:
                piece["usage"] = formatting.usage(collector.choices)
            yield with_details(piece, body.trace, event, here.lm)
    if counted:
        yield heading | {"choices": [], "usage": formatting.usage(collector.choices)}


def _new_texts(choice: Choice, sent: dict[str, int]) -> dict[str, Any]:
    """Return what is new of a choice's texts, and count it as sent."""
    texts = {name: getattr(choice, each)[sent[name] :] for name, each in _TEXTS.items()}
    for name, text in texts.items():
        sent[name] += len(text)
    return {name: text for name, text in texts.items() if text}


def _delta(choice: Choice, change: dict[str, Any]) -> dict[str, Any]:
    finish = choice.finish
    return {"index": choice.index, "delta": change, "logprobs": None, "finish_reason": finish}
