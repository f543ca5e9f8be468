"""Collects a request's choices as they grow, and cancels them when nobody waits any more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from paceline.errors import RequestError
from paceline.serving.api import formatting
from paceline.serving.api.errors import FailedError, LeftError, error_body
from paceline.serving.api.formatting import Choice
from paceline.serving.messages import FAILED, FAILED_ALONE, Job, JobEvent
from paceline.serving.service import Service

if TYPE_CHECKING:
    from paceline.lm import LM


class ChoiceCollector:
    """The choices of one HTTP request.

    Attributes:
        choices: one for each job, in their order; after a search all of its outputs.
    """

    def __init__(self, service: Service, jobs: Sequence[Job]) -> None:
        self.choices = [Choice(job, index) for index, job in enumerate(jobs)]
        self._service = service
        self._streams: list[AsyncIterator[JobEvent]] = []

    async def open(self) -> None:
        """Submit all jobs, or none if one is refused.

        Raises:
            PacelineError: see `Service.stream`.
        """
        try:
            for choice in self.choices:
                self._streams.append(await self._service.stream(choice.job))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Cancel the unfinished choices."""
        for choice in self.choices[: len(self._streams)]:
            if choice.last is None:
                self._service.cancel(choice.job.id)

    async def events(self) -> AsyncIterator[tuple[Choice, JobEvent]]:
        """Yield the events of all choices as they come; each is added to its choice.

        Leaving the iteration early cancels the choices.
        """
        # One at a time: the service keeps, and merges, the backlog of a slow reader.
        ready: asyncio.Queue[tuple[Choice, JobEvent]] = asyncio.Queue(1)

        async def follow(choice: Choice, stream: AsyncIterator[JobEvent]) -> None:
            async for event in stream:
                await ready.put((choice, event))

        pairs = zip(self.choices, self._streams, strict=True)
        tasks = [asyncio.create_task(follow(*pair)) for pair in pairs]
        left = len(tasks)
        try:
            while left:
                choice, event = await ready.get()
                choice.add(event)
                left -= event.finish is not None
                yield choice, event
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.cancel()

    async def finish(self, request: Request, lm: LM, trace: bool = False) -> dict[str, Any]:
        """Wait for all choices; return the passes of the first one if `trace`.

        Raises:
            RequestError: a choice failed.
            FailedError: a choice failed because of a bug.
            LeftError: the client is gone; the choices are cancelled.
        """
        waiting = asyncio.create_task(self._finish(lm, trace))
        leaving = asyncio.create_task(_left(request))
        try:
            await asyncio.wait([waiting, leaving], return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                return waiting.result()
            raise LeftError("the client closed the connection")
        finally:
            for task in (waiting, leaving):
                task.cancel()
            self.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(waiting, leaving, return_exceptions=True)

    async def _finish(self, lm: LM, trace: bool) -> dict[str, Any]:
        passes = []
        async for choice, event in self.events():
            if trace and choice.index == 0 and event.tokens:
                passes.append(formatting.traced(event, lm))
            if event.finish == "error":
                bug = event.error in (FAILED, FAILED_ALONE)
                raise (FailedError if bug else RequestError)(event.error)
        self.choices[:] = formatting.expand_searches(self.choices)
        return {"trace": passes} if trace else {}

    def streamed(
        self,
        pieces: AsyncIterator[str],
        failed: Callable[[Exception], str] | None = None,
        media_type: str = "text/event-stream",
    ) -> StreamingResponse:
        """Return a stream of text; when its reader leaves, cancel the choices.

        Args:
            pieces: of the stream.
            failed: returns the last piece of a stream that fails on its way. Default: an event
                with OpenAI's error.
            media_type: of the stream.
        """
        return _Streamed(self, _with_errors(pieces, failed or _error_event), media_type)


class _Streamed(StreamingResponse):
    def __init__(
        self, collector: ChoiceCollector, pieces: AsyncIterator[str], media_type: str
    ) -> None:
        super().__init__(pieces, media_type=media_type)
        self._collector = collector

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._collector.cancel()


async def _with_errors(
    pieces: AsyncIterator[str], failed: Callable[[Exception], str]
) -> AsyncIterator[str]:
    try:
        async for piece in pieces:
            yield piece
    except Exception as error:
        yield failed(error)


def _error_event(error: Exception) -> str:
    return f"data: {json.dumps(error_body(error))}\n\n"


async def _left(request: Request) -> None:
    """Return when the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
