"""The HTTP server: limits connections and the time for request heads; drains at shutdown."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import monotonic
from types import FrameType
from typing import Any, Protocol

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from paceline.serving.api.errors import refusal
from paceline.serving.settings import ServerSettings

_log = logging.getLogger(__name__)
_FLUSH = 5  # seconds to send pending data at shutdown
_FULL = bytes(refusal(503, "too many connections; try again later", "server_error").body)
_HEAD = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: %d\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n"
)


class TimeoutProtocol(H11Protocol):
    """Closes connections whose request head takes too long, and those above the limit.

    uvicorn limits only the time between requests. The application gets the transport, to abort
    connections whose client does not read.

    Attributes:
        head_seconds: maximum time for a head to arrive.
        max_connections: maximum open connections.
        retry: returns the seconds for Retry-After.
    """

    head_seconds = 10.0
    max_connections = 1024
    retry: Callable[[], int] = staticmethod(lambda: 1)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        self._head_timer: asyncio.TimerHandle | None = None
        self.app_state = self.app_state | {"transport": transport}
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.write(_HEAD % (self.retry(), len(_FULL)) + _FULL)
            transport.close()
        else:
            self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        super().data_received(data)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        super().connection_lost(exc)
        self._stop_timer()

    def _wait_for_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self._head_timer is None and self.timeout_keep_alive_task is None:
            self._head_timer = self.loop.call_later(self.head_seconds, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._head_timer:
            self._head_timer.cancel()
        self._head_timer = None


class Stoppable(Protocol):
    """What is behind a server: a service, or a proxy of many."""

    @property
    def idle(self) -> bool:
        """Return whether every request has got its end."""

    def drain(self) -> None:
        """Refuse new requests; running ones continue."""

    def stop(self) -> None:
        """End the running requests, from any thread."""


class DrainingServer(uvicorn.Server):
    """Drains at the first signal: refuses new requests, and stops once the running ones have ended.

    Requests that have not ended after `drain` seconds are cancelled. A second signal stops at once.
    """

    def __init__(self, app: Any, service: Stoppable, settings: ServerSettings) -> None:
        limits = {
            "head_seconds": settings.head_seconds,
            "max_connections": settings.max_connections,
            "retry": staticmethod(app.state.context.retry),
        }
        protocol = type("Protocol", (TimeoutProtocol,), limits)
        config = uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=settings.idle_seconds,  # type: ignore[arg-type]
            timeout_graceful_shutdown=_FLUSH,
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
        )
        super().__init__(config)
        self._service, self._seconds = service, settings.drain
        self._end: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See the class."""
        if self._end is not None:
            self.should_exit = self.force_exit = True
            return
        self._service.drain()
        self._end = monotonic() + self._seconds

    async def on_tick(self, counter: int) -> bool:
        """Check ten times a second whether to stop."""
        over = self._end is not None and (self._service.idle or monotonic() >= self._end)
        if over:
            await asyncio.to_thread(self._service.stop)
        return await super().on_tick(counter) or over
