"""A server without a socket: an ASGI application that is called."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from fastapi import FastAPI

Part = tuple[int, list[tuple[bytes, bytes]]] | bytes  # status and headers, then the body


class Replica:
    """One engine and its API.

    Args:
        build: makes the application, where the replica is.
    """

    def __init__(self, build: Callable[[], FastAPI]) -> None:
        self._app = build()
        self._started: asyncio.Task[object] | None = None

    async def ask(self, scope: dict[str, Any], body: bytes, key: str) -> AsyncIterator[Part]:
        """Answer a request; who stops listening gives it up.

        Args:
            scope: of ASGI.
            body: whole.
            key: for the router.
        """
        del key
        if self._started is None:
            lifespan = self._app.router.lifespan_context(self._app)
            self._started = asyncio.create_task(lifespan.__aenter__())
        await asyncio.shield(self._started)
        messages: asyncio.Queue[Any] = asyncio.Queue(1)
        unread, gone = [body], asyncio.Event()

        async def receive() -> dict[str, Any]:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app({**scope, "type": "http"}, receive, messages.put)
            finally:
                await messages.put(None)

        task = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    yield message["status"], [(bytes(k), bytes(v)) for k, v in message["headers"]]
                elif message.get("body"):
                    yield bytes(message["body"])
        finally:
            gone.set()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(task, return_exceptions=True)
