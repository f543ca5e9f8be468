"""The answers to a request while they grow, and what becomes of them when nobody waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from paceline.errors import RequestError
from paceline.serving.api import formatting
from paceline.serving.api.errors import FailedError, LeftError
from paceline.serving.api.formatting import Choice
from paceline.serving.messages import FAILED, FAILED_ALONE, Job, JobEvent
from paceline.serving.service import Service

if TYPE_CHECKING:
    from paceline.lm import LM


class ChoiceCollector:
    """The answers to one request.

    Attributes:
        answers: one for each ask, in their order; of a search, once it is over, all that it found.
    """

    def __init__(self, service: Service, jobs: Sequence[Job]) -> None:
        self.answers = [Choice(job, place) for place, job in enumerate(jobs)]
        self._service = service
        self._streams: list[AsyncIterator[JobEvent]] = []

    async def open(self) -> None:
        """Hand all asks in, or none where one is refused.

        Raises:
            PacelineError: as `Service.stream`.
        """
        try:
            for answer in self.answers:
                self._streams.append(await self._service.stream(answer.job))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Give up what is not over yet."""
        for answer in self.answers[: len(self._streams)]:
            if answer.last is None:
                self._service.cancel(answer.job.id)

    async def events(self) -> AsyncIterator[tuple[Choice, JobEvent]]:
        """The events of all answers as they come; each is added to its answer.

        Whoever leaves early cancels them.
        """
        # One at a time: what a slow reader leaves behind is kept by the service, which merges it.
        ready: asyncio.Queue[tuple[Choice, JobEvent]] = asyncio.Queue(1)

        async def follow(answer: Choice, stream: AsyncIterator[JobEvent]) -> None:
            async for event in stream:
                await ready.put((answer, event))

        pairs = zip(self.answers, self._streams, strict=True)
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
            self.cancel()

    async def finish(self, request: Request, lm: LM, trace: bool = False) -> dict[str, Any]:
        """Wait for all answers; the passes of the first, where they are wanted.

        Raises:
            RequestError: one failed.
            FailedError: by our fault.
            LeftError: the client is gone; the answers are given up.
        """
        waiting = asyncio.create_task(self._finish(lm, trace))
        leaving = asyncio.create_task(_left(request))
        try:
            await asyncio.wait([waiting, leaving], return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                return waiting.result()
            raise LeftError("the client left")
        finally:
            for task in (waiting, leaving):
                task.cancel()
            self.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(waiting, leaving, return_exceptions=True)

    async def _finish(self, lm: LM, trace: bool) -> dict[str, Any]:
        passes = []
        async for answer, event in self.events():
            if trace and answer.index == 0 and event.tokens:
                passes.append(formatting.traced(event, lm))
            if event.finish == "error":
                bug = event.error in (FAILED, FAILED_ALONE)
                raise (FailedError if bug else RequestError)(event.error)
        self.answers[:] = formatting.found(self.answers)
        return {"trace": passes} if trace else {}

    def streamed(self, pieces: AsyncIterator[str]) -> StreamingResponse:
        """A response of server-sent events; when its reader leaves, the answers are given up."""
        return _Streamed(self, pieces)


class _Streamed(StreamingResponse):
    def __init__(self, answering: ChoiceCollector, pieces: AsyncIterator[str]) -> None:
        super().__init__(pieces, media_type="text/event-stream")
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answering.cancel()


async def _left(request: Request) -> None:
    """Return when the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
