"""A server without a socket: an ASGI application that is called directly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from fastapi import FastAPI
from prometheus_client.core import Metric

from paceline.serving.cluster.usage import UsageMeter, UsageReport
from paceline.serving.metrics import Metrics
from paceline.serving.rate_limits import RateLimits


class ResponseHead(NamedTuple):
    """The start of a response.

    Attributes:
        status: of HTTP.
        headers: names and values.
        path: of the route that answers.
    """

    status: int
    headers: list[tuple[bytes, bytes]]
    path: str = "other"


ResponsePart = ResponseHead | bytes  # the head, then the body


class Replica:
    """One engine and its API.

    Args:
        build: makes the application on the replica's node, given the rate limits that record usage.
        name: unique.
    """

    def __init__(self, build: Callable[[RateLimits], FastAPI], name: str = "") -> None:
        self._meter, self._name = UsageMeter(), name
        self._app = build(self._meter)
        self._started: asyncio.Task[object] | None = None

    async def usage(self, charged: Mapping[str, int]) -> UsageReport:
        """Return the token usage of its clients; see `UsageMeter.report`."""
        return self._meter.report(self._name, charged)

    async def measured(self) -> tuple[str, list[Metric]]:
        """Return its name and its metrics."""
        metrics: Metrics = self._app.state.metrics
        return self._name, metrics.families()

    async def handle(
        self, scope: dict[str, Any], body: bytes, key: str
    ) -> AsyncIterator[ResponsePart]:
        """Yield the response to a request; leaving the iteration cancels it.

        Args:
            scope: of ASGI.
            body: complete.
            key: for the router.
        """
        del key
        if self._started is None:
            lifespan = self._app.router.lifespan_context(self._app)
            self._started = asyncio.create_task(lifespan.__aenter__())
        await asyncio.shield(self._started)
        scope = {**scope, "type": "http"}
        messages: asyncio.Queue[Any] = asyncio.Queue(1)
        unread, gone = [body], asyncio.Event()

        async def receive() -> dict[str, Any]:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if not gone.is_set():  # otherwise nobody would take it
                await messages.put(message)

        async def run() -> None:
            try:
                await self._app(scope, receive, send)
            finally:
                await send(None)

        task = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    headers = [(bytes(k), bytes(v)) for k, v in message["headers"]]
                    path = getattr(scope.get("route"), "path", "other")
                    yield ResponseHead(message["status"], headers, str(path))
                elif message.get("body"):
                    yield bytes(message["body"])
        finally:
            gone.set()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(task, return_exceptions=True)
