"""Answers while a model loads: the port is bound, and every request is told to come back."""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ssl import SSLContext
from threading import Event, Thread

_BODY = json.dumps(
    {
        "ready": False,
        "error": {
            "message": "the model is loading; try again later",
            "type": "server_error",
            "param": None,
            "code": None,
        },
    }
).encode()
# For a browser: it asks again by itself, without scripts.
_PAGE = b"""<!doctype html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><meta http-equiv="refresh" content="2">
<title>Paceline</title>
<h1>The model is loading</h1>
<p>This page opens by itself in a moment. <a href="/">Retry now</a></p>
</html>
"""
_HEAD = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: %b\r\nRetry-After: 1\r\n"
    b"Cache-Control: no-store\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
)
_HEAD_SECONDS = 1.0  # for the head of a request to arrive
_LARGEST_HEAD = 1 << 16  # bytes


@contextmanager
def answering(listener: socket.socket, tls: SSLContext | None = None) -> Iterator[None]:
    """Answer 503 to what connects to a listening socket, until the block ends.

    Args:
        listener: the socket.
        tls: the context of a server that speaks HTTPS.
    """
    stop = Event()
    arguments = (listener, stop, tls)
    thread = Thread(target=_answer_all, args=arguments, name="paceline-loading", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _answer_all(listener: socket.socket, stop: Event, tls: SSLContext | None) -> None:
    while not stop.is_set():
        ready, _, _ = select.select([listener], [], [], 0.05)
        if not ready:
            continue
        with suppress(OSError):  # the client is gone, or sends nothing
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(_HEAD_SECONDS)
                if tls is None:
                    _answer(connection)
                    continue
                with tls.wrap_socket(connection, server_side=True) as secured:
                    _answer(secured)


def _answer(connection: socket.socket) -> None:
    """Read the head of a request and refuse it."""
    head = b""
    while b"\r\n\r\n" not in head and len(head) < _LARGEST_HEAD:
        part = connection.recv(4096)
        if not part:
            return
        head += part
    page = head.startswith((b"GET / ", b"HEAD / ")) and b"text/html" in head.lower()
    kind, body = (b"text/html", _PAGE) if page else (b"application/json", _BODY)
    answer = _HEAD % (kind, len(body))
    connection.sendall(answer if head.startswith(b"HEAD ") else answer + body)
    connection.shutdown(socket.SHUT_WR)
