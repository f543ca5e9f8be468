"""As much of an HTTP client as measuring a server takes: a request, and its lines as they come.

A library would hide when a byte arrived, and who has already connected; here every request has a
connection of its own.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from paceline.errors import RequestError

_LINE = 1 << 20  # bytes of a line of a stream at most


class BrokenError(Exception):
    """The other side did not keep to HTTP, or ended too early."""


@dataclass(frozen=True)
class Server:
    """Where an API is.

    Attributes:
        host: name or address.
        port: of it.
        path: that the API's paths begin with, e.g. `/v1`.
        secure: whether it speaks TLS.
        key: sent as a bearer token; empty sends none.
    """

    host: str
    port: int
    path: str
    secure: bool = False
    key: str = ""

    @classmethod
    def parse(cls, url: str, key: str = "") -> Server:
        """An address such as `http://127.0.0.1:8000`; `/v1` is added where it is missing.

        Raises:
            RequestError: it is none.
        """
        try:
            found = urlsplit(url if "://" in url else f"http://{url}")
            port = found.port
        except ValueError as error:
            raise RequestError(f"{url!r} is no address: {error}") from None
        plain = found.hostname and not (found.username or found.query or found.fragment)
        if found.scheme not in ("http", "https") or not plain or not found.netloc.isascii():
            raise RequestError(f"{url!r} is no address, expected one like http://127.0.0.1:8000")
        if not key.isascii() or not key.isprintable():
            raise RequestError("the API key has characters that no header may have")
        path = found.path.rstrip("/")
        secure = found.scheme == "https"
        return cls(
            host=str(found.hostname),
            port=port or (443 if secure else 80),
            path=path if path.endswith("/v1") else f"{path}/v1",
            secure=secure,
            key=key,
        )


@dataclass
class Answer:
    """An answer whose body is still to come.

    Attributes:
        status: of HTTP.
        lines: of the body, without their ends; raises `BrokenError` where it ends too early.
    """

    status: int
    lines: AsyncIterator[bytes]

    async def json(self) -> Any:
        """The whole body.

        Raises:
            BrokenError: it is not JSON.
        """
        try:
            return json.loads(b"\n".join([line async for line in self.lines]))
        except (ValueError, RecursionError):
            raise BrokenError("the body is not JSON") from None


@asynccontextmanager
async def request(server: Server, path: str, body: object = None) -> AsyncIterator[Answer]:
    """GET, or POST of a body as JSON; the connection is closed on leaving.

    Raises:
        OSError: there is no connection.
        BrokenError: what comes is not HTTP.
    """
    context = ssl.create_default_context() if server.secure else None
    reader, writer = await asyncio.open_connection(
        server.host, server.port, ssl=context, limit=_LINE
    )
    try:
        writer.write(_head(server, path, body))
        await writer.drain()
        status, headers = await _answered(reader)
        yield Answer(status, _lines(_chunks(reader, headers)))
    except (asyncio.IncompleteReadError, ValueError) as error:
        raise BrokenError(str(error)) from None
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def _head(server: Server, path: str, body: object) -> bytes:
    content = b"" if body is None else json.dumps(body).encode()
    host = f"[{server.host}]" if ":" in server.host else server.host
    lines = [
        f"{'GET' if body is None else 'POST'} {server.path}{path} HTTP/1.1",
        f"Host: {host}:{server.port}",
        "Connection: close",
        "Accept-Encoding: identity",
        f"Content-Length: {len(content)}",
    ]
    if body is not None:
        lines.append("Content-Type: application/json")
    if server.key:
        lines.append(f"Authorization: Bearer {server.key}")
    return "\r\n".join([*lines, "", ""]).encode() + content


async def _answered(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers of an answer."""
    words = (await reader.readline()).split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        raise BrokenError("the answer is not HTTP")
    headers = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip().lower()
    return int(words[1]), headers


async def _chunks(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """The body as it comes, by any of the three ways to tell its end."""
    if headers.get("transfer-encoding") == "chunked":
        while size := int((await _line(reader)).partition(b";")[0], 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
    elif "content-length" in headers:
        left = int(headers["content-length"])
        while left:
            part = await reader.read(min(left, _LINE))
            if not part:
                raise BrokenError("the body ends too early")
            left -= len(part)
            yield part
    else:
        while part := await reader.read(_LINE):
            yield part


async def _line(reader: asyncio.StreamReader) -> bytes:
    line = await reader.readline()
    if not line:
        raise BrokenError("the body ends too early")
    return line


async def _lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    rest = b""
    async for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r")
        if len(rest) > _LINE:
            raise BrokenError(f"a line is longer than {_LINE} bytes")
    if rest:
        yield rest
