"""Passes requests on to replicas; a request survives the death of its replica."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from time import monotonic
from typing import Any, Protocol

from starlette.types import Receive, Scope, Send

from paceline.serving.api.errors import refusal
from paceline.serving.cluster.affinity import beginning
from paceline.serving.cluster.replica import ResponsePart
from paceline.serving.cluster.resume import ResumedStream, SeamError
from paceline.serving.cluster.resume_responses import ResumedItems

_log = logging.getLogger(__name__)
_RESUMABLE: dict[str, type[ResumedStream] | type[ResumedItems]] = {
    "/v1/completions": ResumedStream,
    "/v1/chat/completions": ResumedStream,
    "/v1/responses": ResumedItems,
}
_KEPT = ("method", "path", "raw_path", "query_string", "client", "server", "scheme")
_ID = b"x-request-id"
_TRIES = 8
_PAUSE = 0.25  # seconds before the first retry; doubles with each
_FULL = (429, 503)  # a later attempt may succeed


class ReplicaSet(Protocol):
    """The replicas.

    Attributes:
        size: number of replicas that should exist.
        lost: exceptions that `handle` raises when a replica dies.
    """

    size: int
    lost: tuple[type[Exception], ...]

    def handle(
        self, scope: dict[str, Any], body: bytes, key: str
    ) -> AsyncGenerator[ResponsePart, None]:
        """Yield a replica's response to a request, given its beginning as the key."""

    async def each(self, method: str, *args: Any) -> list[Any]:
        """Return the result of a method of each living replica that answers."""

    async def running(self) -> int:
        """Return the number of living replicas."""


class _LaterError(Exception):
    """The replica that should continue a stream has no capacity now."""


class ReplicaProxy:
    """An ASGI application that lets replicas answer; a `Stoppable` behind `DrainingServer`.

    Args:
        fleet: the replicas.

    Attributes:
        moved: number of retries.
        draining: new requests are refused.
    """

    def __init__(self, fleet: ReplicaSet) -> None:
        self._fleet = fleet
        self.moved = 0
        self.draining = False
        self._running: set[asyncio.Task[None]] = set()

    @property
    def idle(self) -> bool:
        """Return whether every request has got its end."""
        return not self._running

    def retry(self) -> int:
        """Return the seconds after which a client without a connection may try again."""
        return 1

    def drain(self) -> None:
        """Refuse new requests; running ones continue."""
        self.draining = True

    def stop(self) -> None:
        """End the running requests, from any thread."""
        self.draining = True
        for task in self._running.copy():
            task.get_loop().call_soon_threadsafe(task.cancel)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request of HTTP; see ASGI."""
        if self.draining and scope["method"] == "POST":
            reason = "the server is shutting down; try another"
            await refusal(503, reason, "server_error", wait=5)(scope, receive, send)
            return
        try:
            body = await _read(receive)
        except ConnectionError:
            return
        sent = _ClientResponse(scope, receive, send)
        answering = asyncio.create_task(self._answer(scope, body, sent))
        leaving = asyncio.create_task(_left(receive))
        self._running.add(answering)
        try:
            await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
            if answering.cancelled():
                await sent.fail("the server stopped before the answer was complete")
            elif answering.done():
                answering.result()
        finally:
            answering.cancel()
            leaving.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)
            self._running.discard(answering)

    async def _answer(self, scope: Scope, body: bytes, sent: _ClientResponse) -> None:
        body, key = seeded(scope["path"], body)
        kept, why = _passed_on(scope), "no replica could answer; try again"
        for attempt in range(_TRIES):
            if attempt:
                self.moved += 1
                await asyncio.sleep(_PAUSE * 2 ** (attempt - 1))
            try:
                async with aclosing(self._fleet.handle(kept, body, key)) as parts:
                    async for part in parts:
                        await sent.add(part)
                await sent.end()
                return
            except self._fleet.lost:
                _log.warning("a replica died; its request is retried")
                try:
                    sent.again()
                except SeamError as error:
                    why = f"a replica died, and {error}"
                    break
            except _LaterError:
                why = "a replica died, and the others are full; try again"
            except SeamError as error:
                why = f"a replica died, and {error}"
                break
        await sent.fail(why)


class _ClientResponse:
    """What a client was sent of a response, over all attempts.

    Streams are sent as they come. Other responses are sent once they are complete, so that an
    attempt may start over.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._stream = self._over = False
        self._start: dict[str, Any] = {}
        self._sent = bytearray()  # of a stream: sent; of another response: kept back
        self._at = monotonic()  # time of the last send
        self._resumed: ResumedStream | ResumedItems | None = None
        self._rest = b""

    async def add(self, part: ResponsePart) -> None:
        """Process the next part of an attempt.

        Raises:
            SeamError: it does not continue what was sent.
            _LaterError: a later attempt may.
        """
        if not isinstance(part, bytes):
            if not self._stream:
                await self._begin(part)
            elif part.status in _FULL:
                raise _LaterError
            elif part.status != 200:
                raise SeamError(f"another one refused the request with status {part.status}")
            return
        if self._resumed:
            *events, self._rest = (self._rest + part).split(b"\n\n")
            part = b"".join(self._resumed.rest(event) for event in events)
        self._sent += part
        if self._stream and part:
            self._at = monotonic()
            await self._body(part, True)

    async def _begin(self, head: ResponsePart) -> None:
        assert not isinstance(head, bytes)
        self._scope["route"] = head  # for the metrics by path
        headers = [(name, value) for name, value in head.headers if name != _ID]
        self._start = {"type": "http.response.start", "status": head.status, "headers": headers}
        kinds = [value for name, value in headers if name == b"content-type"]
        self._stream = any(kind.startswith(b"text/event-stream") for kind in kinds)
        if self._stream:
            await self._send(self._start)

    def again(self) -> None:
        """Prepare for another attempt.

        Raises:
            SeamError: the response cannot be continued.
        """
        if not self._stream:
            self._sent.clear()
            return
        resumed = _RESUMABLE.get(self._scope["path"])
        if resumed is None:
            raise SeamError("the rest of this stream cannot be reconstructed")
        self._resumed, self._rest = resumed(bytes(self._sent), lambda: monotonic() - self._at), b""

    async def end(self) -> None:
        """Send what is left; the response is complete."""
        self._over = True
        if not self._stream:
            await self._send(self._start)
        await self._body(b"" if self._stream else bytes(self._sent), False)

    async def fail(self, why: str) -> None:
        """End the response with an error, unless its end is being sent."""
        if self._over:
            return
        if self._stream:
            error = {"message": why, "type": "server_error", "param": None, "code": None}
            await self._body(f"data: {json.dumps({'error': error})}\n\n".encode(), False)
        else:
            await refusal(503, why, "server_error", wait=1)(self._scope, self._receive, self._send)

    async def _body(self, part: bytes, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": part, "more_body": more})


def seeded(path: str, body: bytes) -> tuple[bytes, str]:
    """Return a body with a seed, so that every replica gives the same answer, and its beginning."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return body, ""
    key = beginning(fields)
    if path in _RESUMABLE and isinstance(fields, dict) and fields.get("seed") is None:
        fields["seed"] = secrets.randbits(32)
        body = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode(
            errors="surrogatepass"
        )
    return body, key


def _passed_on(scope: Scope) -> dict[str, Any]:
    """Return the scope for a replica, with the id that the request has here."""
    kept = {name: scope[name] for name in _KEPT if name in scope}
    request_id = scope.get("state", {}).get("request")
    headers = [
        (name, value) for name, value in scope["headers"] if not (request_id and name == _ID)
    ]
    return kept | {"headers": headers + ([(_ID, request_id.encode())] if request_id else [])}


async def _read(receive: Receive) -> bytes:
    """Return the whole body.

    Raises:
        ConnectionError: the client left before its end.
    """
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        body += message.get("body", b"")
        if not message.get("more_body"):
            return bytes(body)


async def _left(receive: Receive) -> None:
    """Return when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
