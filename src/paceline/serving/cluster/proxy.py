"""Requests on their way to replicas. A replica that dies takes none with it."""

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
_SPLICED: dict[str, type[ResumedStream] | type[ResumedItems]] = {
    "/v1/completions": ResumedStream,
    "/v1/chat/completions": ResumedStream,
    "/v1/responses": ResumedItems,
}
_KEPT = ("method", "path", "raw_path", "query_string", "client", "server", "scheme")
_ID = b"x-request-id"
_TRIES = 8
_PAUSE = 0.25  # seconds before a request is tried again, the first time
_FULL = (429, 503)  # what a replica says that others may not say later


class ReplicaSet(Protocol):
    """The replicas.

    Attributes:
        size: how many there should be.
        lost: what `ask` raises when a replica dies.
    """

    size: int
    lost: tuple[type[Exception], ...]

    def handle(
        self, scope: dict[str, Any], body: bytes, key: str
    ) -> AsyncGenerator[ResponsePart, None]:
        """A replica's answer to a scope, a body and a key."""

    async def each(self, method: str, *args: Any) -> list[Any]:
        """What each living replica returns; nothing of those that do not answer."""

    async def running(self) -> int:
        """How many live."""


class _LaterError(Exception):
    """The replica that should go on with a stream has no place now."""


class ReplicaProxy:
    """An ASGI application that lets replicas answer, and what `DrainingServer` stops.

    Args:
        fleet: the replicas.

    Attributes:
        moved: times that a request was tried again.
        draining: no more requests are taken.
    """

    def __init__(self, fleet: ReplicaSet) -> None:
        self._fleet = fleet
        self.moved = 0
        self.draining = False
        self._under_way: set[asyncio.Task[None]] = set()

    @property
    def idle(self) -> bool:
        """Whether everybody was told the end."""
        return not self._under_way

    def retry(self) -> int:
        """Seconds after which who finds no connection may try again."""
        return 1

    def drain(self) -> None:
        """Take no more requests; those under way go on."""
        self.draining = True

    def stop(self) -> None:
        """Give those under way up and tell them, from any thread."""
        self.draining = True
        for task in self._under_way.copy():
            task.get_loop().call_soon_threadsafe(task.cancel)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI; of HTTP only."""
        if self.draining and scope["method"] == "POST":
            said = "the server is shutting down; try another"
            await refusal(503, said, "server_error", wait=5)(scope, receive, send)
            return
        try:
            body = await _read(receive)
        except ConnectionError:
            return
        sent = _ClientResponse(scope, receive, send)
        answering = asyncio.create_task(self._answer(scope, body, sent))
        leaving = asyncio.create_task(_left(receive))
        self._under_way.add(answering)
        try:
            await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
            if answering.cancelled():
                await sent.fail("the server stopped before the answer was whole")
            elif answering.done():
                answering.result()
        finally:
            answering.cancel()
            leaving.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)
            self._under_way.discard(answering)

    async def _answer(self, scope: Scope, body: bytes, sent: _ClientResponse) -> None:
        body, key = seeded(scope["path"], body)
        kept, why = _passed_on(scope), "no replica is there to answer; try again"
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
                _log.warning("a replica died; its request is tried again")
                try:
                    sent.again()
                except SeamError as error:
                    why = f"a replica died, and {error}"
                    break
            except _LaterError:
                why = "a replica died, and the others have no place now"
            except SeamError as error:
                why = f"a replica died, and {error}"
                break
        await sent.fail(why)


class _ClientResponse:
    """What a client was told of an answer, over all attempts.

    Streams are told as they come. Other answers are told when they are whole, so that another
    attempt may begin anew.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._stream = self._over = False
        self._start: dict[str, Any] = {}
        self._said = bytearray()  # of a stream: told; of another answer: kept
        self._at = monotonic()  # when something was told
        self._splice: ResumedStream | ResumedItems | None = None
        self._rest = b""

    async def add(self, part: ResponsePart) -> None:
        """Take the next part of an attempt in.

        Raises:
            SeamError: what was told does not go on so.
            _LaterError: it may go on later.
        """
        if not isinstance(part, bytes):
            if not self._stream:
                await self._begin(part)
            elif part.status in _FULL:
                raise _LaterError
            elif part.status != 200:
                raise SeamError(f"another refuses it with status {part.status}")
            return
        if self._splice:
            *events, self._rest = (self._rest + part).split(b"\n\n")
            part = b"".join(self._splice.rest(event) for event in events)
        self._said += part
        if self._stream and part:
            self._at = monotonic()
            await self._body(part, True)

    async def _begin(self, head: ResponsePart) -> None:
        assert not isinstance(head, bytes)
        self._scope["route"] = head  # its path is counted
        headers = [(name, value) for name, value in head.headers if name != _ID]
        self._start = {"type": "http.response.start", "status": head.status, "headers": headers}
        kinds = [value for name, value in headers if name == b"content-type"]
        self._stream = any(kind.startswith(b"text/event-stream") for kind in kinds)
        if self._stream:
            await self._send(self._start)

    def again(self) -> None:
        """Prepare for another attempt.

        Raises:
            SeamError: there can be none.
        """
        if not self._stream:
            self._said.clear()
            return
        splice = _SPLICED.get(self._scope["path"])
        if splice is None:
            raise SeamError("the rest cannot be told")
        self._splice, self._rest = splice(bytes(self._said), lambda: monotonic() - self._at), b""

    async def end(self) -> None:
        """The answer is whole."""
        self._over = True
        if not self._stream:
            await self._send(self._start)
        await self._body(b"" if self._stream else bytes(self._said), False)

    async def fail(self, why: str) -> None:
        """There is no going on; who is being told the end is told no more."""
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
    """A body that gives the same answer wherever it is run, and the beginning of its prompt."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return body, ""
    key = beginning(found)
    if path in _SPLICED and isinstance(found, dict) and found.get("seed") is None:
        found["seed"] = secrets.randbits(32)
        body = json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode(
            errors="surrogatepass"
        )
    return body, key


def _passed_on(scope: Scope) -> dict[str, Any]:
    """What a replica is told of a request, with the id that it has here."""
    kept = {name: scope[name] for name in _KEPT if name in scope}
    given = scope.get("state", {}).get("request")
    headers = [(name, value) for name, value in scope["headers"] if not (given and name == _ID)]
    return kept | {"headers": headers + ([(_ID, given.encode())] if given else [])}


async def _read(receive: Receive) -> bytes:
    """The body.

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
