"""What routes share: the service, and the streams of a request's answers."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Request

from paceline.errors import RequestError
from paceline.lm import LM
from paceline.serving.api import replies
from paceline.serving.api.asking import Limits
from paceline.serving.api.refusals import NotFoundError
from paceline.serving.api.replies import Answer
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


def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


Here = Annotated[Context, Depends(_context)]


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


def named(kind: str) -> str:
    """A name for a request that no other has."""
    return f"{kind}-{secrets.token_hex(12)}"
