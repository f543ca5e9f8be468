"""A minimal HTTP client for load tests: sends a request and yields its lines as they come.

A library would hide when a byte arrives, and which connections are open; here every request has
its own connection.
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

_LINE = 1 << 20  # largest line of a stream, in bytes


class BrokenError(Exception):
    """The server did not follow HTTP, or ended too early."""


@dataclass(frozen=True)
class ServerAddress:
    """The address of an API.

    Attributes:
        host: name or address.
        port: TCP port.
        path: prefix of the API's paths, e.g. `/v1`.
        secure: whether the server speaks TLS.
        key: sent as a bearer token; empty sends none.
    """

    host: str
    port: int
    path: str
    secure: bool = False
    key: str = ""

    @classmethod
    def parse(cls, url: str, key: str = "") -> ServerAddress:
        """Parse an address such as `http://127.0.0.1:8000`; a missing `/v1` is added.

        Raises:
            RequestError: it is not an address.
        """
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
        except ValueError as error:
            raise RequestError(f"{url!r} is not an address: {error}") from None
        plain = parts.hostname and not (parts.username or parts.query or parts.fragment)
        if parts.scheme not in ("http", "https") or not plain or not parts.netloc.isascii():
            raise RequestError(
                f"{url!r} is not an address, expected one like http://127.0.0.1:8000"
            )
        if not key.isascii() or not key.isprintable():
            raise RequestError("the API key has characters that an HTTP header cannot hold")
        path = parts.path.rstrip("/")
        secure = parts.scheme == "https"
        return cls(
            host=str(parts.hostname),
            port=port or (443 if secure else 80),
            path=path if path.endswith("/v1") else f"{path}/v1",
            secure=secure,
            key=key,
        )


@dataclass
class HttpResponse:
    """A response whose body is still to come.

    Attributes:
        status: HTTP status code.
        lines: of the body, without line ends; raises `BrokenError` where it ends too early.
    """

    status: int
    lines: AsyncIterator[bytes]

    async def json(self) -> Any:
        """Read the whole body as JSON.

        Raises:
            BrokenError: it is not JSON.
        """
        try:
            return json.loads(b"\n".join([line async for line in self.lines]))
        except (ValueError, RecursionError):
            raise BrokenError("the body is not JSON") from None


@asynccontextmanager
async def request(
    server: ServerAddress, path: str, body: object = None
) -> AsyncIterator[HttpResponse]:
    """Send a GET, or a POST with a body as JSON; the connection is closed on leaving.

    Raises:
        OSError: there is no connection.
        BrokenError: the response is not HTTP.
    """
    context = ssl.create_default_context() if server.secure else None
    reader, writer = await asyncio.open_connection(
        server.host, server.port, ssl=context, limit=_LINE
    )
    try:
        writer.write(_head(server, path, body))
        await writer.drain()
        status, headers = await _read_head(reader)
        yield HttpResponse(status, _lines(_chunks(reader, headers)))
    except (asyncio.IncompleteReadError, ValueError) as error:
        raise BrokenError(str(error)) from None
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def _head(server: ServerAddress, path: str, body: object) -> bytes:
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


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Read the status and the headers of a response."""
    words = (await reader.readline()).split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        raise BrokenError("the answer is not HTTP")
    headers = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip().lower()
    return int(words[1]), headers


async def _chunks(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """Yield the body as it comes, by any of the three ways that tell where it ends."""
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
