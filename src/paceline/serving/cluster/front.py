"""One address in front of many replicas. A replica that dies takes no request with it."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.types import Receive, Scope, Send

from paceline.serving.cluster.affinity import beginning
from paceline.serving.cluster.replica import Part
from paceline.serving.cluster.splice import SeamError, Splice

_log = logging.getLogger(__name__)
_SPLICED = ("/v1/completions", "/v1/chat/completions")
_KEPT = ("method", "path", "raw_path", "query_string", "headers", "client", "server", "scheme")
_TRIES = 8
_PAUSE = 0.25  # seconds before a request is tried again, the first time
_BROKEN = {"message": "a replica died, and the rest cannot be told", "type": "server_error"}

Ask = Callable[[dict[str, Any], bytes, str], AsyncGenerator[Part, None]]


class Front:
    """An ASGI application that lets replicas answer.

    Args:
        ask: a replica's answer to a scope, a body and a key.
        lost: what `ask` raises when a replica dies.
        largest: bytes of a body.
    """

    def __init__(self, ask: Ask, lost: tuple[type[Exception], ...], largest: int = 1 << 26) -> None:
        self._ask, self._lost, self._largest = ask, lost, largest
        self.moved = 0  # times that a request was tried again

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; of other protocols than HTTP only the lifespan is kept."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] == "http":
            try:
                body = await self._read(receive)
            except ConnectionError:
                return
            if body is None:
                await _refuse(send, 413, f"the body is larger than {self._largest} bytes")
                return
            answering = asyncio.create_task(self._answer(scope, body, send))
            leaving = asyncio.create_task(_left(receive))
            try:
                await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
                if answering.done():
                    answering.result()
            finally:
                answering.cancel()
                leaving.cancel()
                await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _read(self, receive: Receive) -> bytes | None:
        """The body; None where it is too large.

        Raises:
            ConnectionError: the client left before its end.
        """
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._largest:
                return None
            if not message.get("more_body"):
                return b"".join(parts)

    async def _answer(self, scope: Scope, body: bytes, send: Send) -> None:
        body, key = seeded(scope["path"], body)
        kept = {name: scope[name] for name in _KEPT if name in scope}
        sent = _Sent(send, scope["path"])
        for attempt in range(_TRIES):
            try:
                async with aclosing(self._ask(kept, body, key)) as parts:
                    async for part in parts:
                        await sent.add(part)
                await sent.end()
                return
            except self._lost:
                _log.warning("a replica died; its request is tried again")
            except SeamError:
                break
            self.moved += 1
            if not sent.again():
                break
            await asyncio.sleep(_PAUSE * 2**attempt)
        await sent.fail()


class _Sent:
    """What a client was told of an answer, over all attempts.

    Streams are told as they come. Other answers are told when they are whole, so that another
    attempt may begin anew.
    """

    def __init__(self, send: Send, path: str) -> None:
        self._send, self._path = send, path
        self._stream = False
        self._start: dict[str, Any] = {}
        self._said = bytearray()  # of a stream: told; of another answer: kept
        self._splice: Splice | None = None
        self._rest = b""

    async def add(self, part: Part) -> None:
        """Take the next part of an attempt in.

        Raises:
            SeamError: what was told does not go on so.
        """
        if not isinstance(part, bytes):
            status, headers = part
            if self._stream:
                if status != 200:
                    raise SeamError
                return
            self._start = {"type": "http.response.start", "status": status, "headers": headers}
            kinds = [value for name, value in headers if name == b"content-type"]
            self._stream = any(kind.startswith(b"text/event-stream") for kind in kinds)
            if self._stream:
                await self._send(self._start)
            return
        if self._splice:
            *events, self._rest = (self._rest + part).split(b"\n\n")
            part = b"".join(self._splice.rest(event) for event in events)
        self._said += part
        if self._stream and part:
            await self._body(part, True)

    def again(self) -> bool:
        """Prepare for another attempt; whether there can be one."""
        if not self._stream:
            self._said.clear()
            return True
        if self._path not in _SPLICED:
            return False
        try:
            self._splice, self._rest = Splice(bytes(self._said)), b""
        except SeamError:
            return False
        return True

    async def end(self) -> None:
        """The answer is whole."""
        if not self._stream:
            await self._send(self._start)
        await self._body(b"" if self._stream else bytes(self._said), False)

    async def fail(self) -> None:
        """There is no going on."""
        if self._stream:
            await self._body(f"data: {json.dumps({'error': _BROKEN})}\n\n".encode(), False)
        else:
            await _refuse(self._send, 503, "no replica is there to answer; try again")

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
        body = json.dumps(found | {"seed": secrets.randbits(32)}).encode()
    return body, key


async def _refuse(send: Send, status: int, message: str) -> None:
    error = {"message": message, "type": "server_error", "param": None, "code": None}
    headers = [(b"content-type", b"application/json"), (b"retry-after", b"1")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})


async def _left(receive: Receive) -> None:
    """Return when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _live(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return
