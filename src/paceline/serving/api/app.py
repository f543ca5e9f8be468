"""The application: routes, and what every request passes through."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from paceline import __version__
from paceline.errors import RequestError
from paceline.lm import LM
from paceline.serving.api import replies
from paceline.serving.api.asking import Limits, chat_asks, completion_asks, message_of
from paceline.serving.api.refusals import NotFoundError, install
from paceline.serving.api.replies import Answer
from paceline.serving.api.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from paceline.serving.service import Service
from paceline.serving.worker import Ask, Event

_Stream = AsyncIterator[Event]


@dataclass
class Context:
    """What routes need.

    Attributes:
        service: runs requests.
        name: what the model is called.
        limits: what may be asked for.
    """

    service: Service
    name: str
    limits: Limits = field(default_factory=Limits)

    @property
    def lm(self) -> LM:
        """The model."""
        return self.service.worker.lm

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model.

        Raises:
            NotFoundError: it is not here.
        """
        if name is not None and name != self.name:
            raise NotFoundError(f"there is no model {name!r} here, only {self.name!r}")


def create_app(service: Service, name: str, limits: Limits | None = None) -> FastAPI:
    """The API in front of a started service."""
    app = FastAPI(title="Paceline", version=__version__, docs_url=None, redoc_url=None)
    context = Context(service, name, limits or Limits())
    install(app)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Whether requests are taken."""
        return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """What is served."""
        return {"object": "list", "data": [_model(context)]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        """The model, if it is the one."""
        context.check_model(model)
        return _model(context)

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionBody, request: Request) -> Any:
        """Continue texts."""
        context.check_model(body.model)
        name, client = _named("cmpl"), client_of(request)
        asked = await asyncio.to_thread(
            completion_asks, context.lm, body, name, client, context.limits
        )
        choices = [ask for asks in asked for ask in asks]
        streams = await opened(context.service, choices)
        answers = [Answer(ask, place) for place, ask in enumerate(choices)]
        heading = partial(replies.head, name, "text_completion", context.name)
        echoes = [context.lm.tokenizer.decode(a.ask.request.prompt) for a in answers if body.echo]

        def choice(answer: Answer, text: str) -> dict[str, Any]:
            return {
                "index": answer.index,
                "text": text,
                "logprobs": None,
                "finish_reason": answer.finish,
            }

        async def pieces() -> AsyncIterator[dict[str, Any]]:
            for answer, echo in zip(answers, echoes, strict=False):
                yield heading() | {"choices": [choice(answer, echo)]}
            async for answer, event in together(answers, streams):
                if event.text or event.finish or event.logprobs or body.trace:
                    shown = choice(answer, event.text)
                    if event.logprobs:
                        part = Answer(answer.ask, 0, logprobs=event.logprobs)
                        shown["logprobs"] = replies.completion_logprobs(part, context.lm)
                    yield told(heading() | {"choices": [shown]}, body.trace, event, context.lm)
            if body.stream_options and body.stream_options.include_usage:
                yield heading() | {"choices": [], "usage": replies.usage(answers)}

        if body.stream:
            return StreamingResponse(replies.sse(pieces()), media_type="text/event-stream")
        passes = await finished(answers, streams, body.trace, context.lm)
        kept = best(answers, len(asked), body.n or 1)
        found = []
        for place, answer in enumerate(kept):
            text = echoes[answer.index] + answer.text if echoes else answer.text
            wants = body.logprobs is not None
            logprobs = replies.completion_logprobs(answer, context.lm) if wants else None
            found.append(choice(answer, text) | {"index": place, "logprobs": logprobs})
        return heading() | {
            "choices": found,
            "usage": replies.usage(answers),
            "paceline": replies.speculation(answers) | passes,
        }

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatBody, request: Request) -> Any:
        """Answer in a conversation."""
        context.check_model(body.model)
        name, client = _named("chatcmpl"), client_of(request)
        asks = await asyncio.to_thread(chat_asks, context.lm, body, name, client, context.limits)
        streams = await opened(context.service, asks)
        answers = [Answer(ask, place) for place, ask in enumerate(asks)]

        def delta(answer: Answer, change: dict[str, Any]) -> dict[str, Any]:
            heading = replies.head(name, "chat.completion.chunk", context.name)
            shown = {"index": answer.index, "delta": change, "logprobs": None}
            return heading | {"choices": [shown | {"finish_reason": answer.finish}]}

        async def pieces() -> AsyncIterator[dict[str, Any]]:
            for answer in answers:
                yield delta(answer, {"role": "assistant", "content": ""})
            async for answer, event in together(answers, streams):
                change: dict[str, Any] = {"content": event.text} if event.text else {}
                if answer.ask.request.reading:  # a call is told whole, or not at all
                    change = _whole(answer) if event.finish else {}
                if change or event.finish or event.logprobs or body.trace:
                    piece = delta(answer, change)
                    if event.logprobs:
                        shown = replies.chat_logprobs(event.logprobs, context.lm)
                        piece["choices"][0]["logprobs"] = shown
                    yield told(piece, body.trace, event, context.lm)
            if body.stream_options and body.stream_options.include_usage:
                heading = replies.head(name, "chat.completion.chunk", context.name)
                yield heading | {"choices": [], "usage": replies.usage(answers)}

        if body.stream:
            return StreamingResponse(replies.sse(pieces()), media_type="text/event-stream")
        passes = await finished(answers, streams, body.trace, context.lm)
        choices = [
            {
                "index": answer.index,
                "message": replies.message(answer),
                "logprobs": replies.chat_logprobs(answer.logprobs, context.lm)
                if body.logprobs
                else None,
                "finish_reason": answer.finish,
            }
            for answer in answers
        ]
        return replies.head(name, "chat.completion", context.name) | {
            "choices": choices,
            "usage": replies.usage(answers),
            "paceline": replies.speculation(answers) | passes,
        }

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        """A text's tokens."""
        context.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("give one of prompt and messages")
        if body.prompt is not None:
            tokens = context.lm.tokenizer.encode(body.prompt, special=body.add_special_tokens)
        else:
            messages = [message_of(message) for message in body.messages or []]
            tokens = context.lm.tokenizer.encode_chat(messages)
        window = context.lm.engine.config.context
        return {"tokens": tokens, "count": len(tokens), "max_model_len": window}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        """The text of tokens."""
        context.check_model(body.model)
        size = context.lm.engine.config.vocab_size
        wrong = next((token for token in body.tokens if not 0 <= token < size), None)
        if wrong is not None:
            raise RequestError(f"token {wrong} is outside the vocabulary of {size}")
        return {"prompt": context.lm.tokenizer.decode(body.tokens)}

    return app


async def opened(service: Service, asks: Sequence[Ask]) -> list[_Stream]:
    """A stream for each; none where one is refused.

    Raises:
        PacelineError: as `Service.stream`.
    """
    streams: list[_Stream] = []
    try:
        for ask in asks:
            streams.append(await service.stream(ask))
    except BaseException:
        for ask in asks[: len(streams)]:
            service.cancel(ask.id)
        raise
    return streams


async def together(
    answers: Sequence[Answer], streams: Sequence[_Stream]
) -> AsyncIterator[tuple[Answer, Event]]:
    """The events of all streams as they come; each is added to its answer.

    Whoever leaves early cancels them.
    """
    ready: asyncio.Queue[tuple[Answer, Event]] = asyncio.Queue()

    async def follow(answer: Answer, stream: _Stream) -> None:
        async for event in stream:
            await ready.put((answer, event))

    pairs = zip(answers, streams, strict=True)
    tasks = [asyncio.create_task(follow(*pair)) for pair in pairs]
    left = len(tasks)
    try:
        while left:
            answer, event = await ready.get()
            answer.add(event)
            left -= event.finish is not None
            yield answer, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def finished(
    answers: Sequence[Answer], streams: Sequence[_Stream], trace: bool, lm: LM
) -> dict[str, Any]:
    """Wait for all answers; the passes of the first, where they are wanted.

    Raises:
        RequestError: one failed.
    """
    passes = []
    async for answer, event in together(answers, streams):
        if trace and answer.index == 0 and event.tokens:
            passes.append(replies.traced(event, lm))
        if event.finish == "error":
            raise RequestError(event.error)
    return {"trace": passes} if trace else {}


def best(answers: Sequence[Answer], prompts: int, n: int) -> list[Answer]:
    """The `n` likeliest answers to each prompt, the likeliest first where there is a choice."""
    each = len(answers) // prompts
    if each == n:
        return list(answers)
    groups: Iterable[Sequence[Answer]] = (
        answers[place : place + each] for place in range(0, len(answers), each)
    )
    return [a for group in groups for a in sorted(group, key=lambda a: -a.likelihood)[:n]]


def told(piece: dict[str, Any], trace: bool, event: Event, lm: LM) -> dict[str, Any]:
    """A piece of a stream, with what went wrong, or with its pass where it is looked at."""
    if event.finish == "error":
        piece["error"] = {"message": event.error, "type": "server_error"}
    if trace and event.tokens:
        piece["paceline"] = replies.traced(event, lm)
    return piece


def client_of(request: Request) -> str:
    """Whose request it is: that of a key, else of an address."""
    known: str | None = getattr(request.state, "client", None)
    return known or (request.client.host if request.client else "")


def _whole(answer: Answer) -> dict[str, Any]:
    message = replies.message(answer)
    calls = message.get("tool_calls")
    if not calls:
        return {"content": answer.text}
    return {"tool_calls": [{"index": place} | call for place, call in enumerate(calls)]}


def _model(context: Context) -> dict[str, Any]:
    return {
        "id": context.name,
        "object": "model",
        "created": 0,
        "owned_by": "paceline",
        "max_model_len": context.lm.engine.config.context,
    }


def _named(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"
