"""Frames between a pipeline and its nodes: a JSON head, and the bytes of arrays."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from threading import Lock
from time import monotonic, sleep
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MAGIC = b"PLP1"
_FRAME = struct.Struct("<4sIQ")  # magic, bytes of the head, bytes of the arrays
_LARGEST_HEAD, _LARGEST_BODY = 1 << 24, 1 << 34
_TYPES: dict[str, np.dtype[Any]] = {
    "i4": np.dtype("<i4"),
    "f4": np.dtype("<f4"),
    "u1": np.dtype("u1"),
}

Head = dict[str, Any]


class WireError(Exception):
    """The other side ended the connection, was silent for too long, or sent something else."""


class Link:
    """A connection that carries frames, in order.

    Args:
        connection: connected; it belongs to the link.
        delay: seconds that each frame takes besides, as on a longer way. Both ends must be on one
            machine: what counts is the time when a frame was sent.
    """

    def __init__(self, connection: socket.socket, delay: float = 0.0) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket, self.delay = connection, delay
        self._sending = Lock()

    def send(self, head: Head, arrays: Sequence[NDArray[Any]] = ()) -> None:
        """Send a frame; any thread may.

        Raises:
            WireError: the connection has ended, or the other side takes nothing for too long.
        """
        bodies = [np.ascontiguousarray(array) for array in arrays]
        forms = [[_name(array), list(array.shape)] for array in bodies]
        text = json.dumps({**head, "arrays": forms, "sent": monotonic()}).encode()
        size = sum(array.nbytes for array in bodies)
        try:
            with self._sending:
                self._socket.sendall(_FRAME.pack(_MAGIC, len(text), size) + text)
                for array in bodies:
                    if array.size:
                        self._socket.sendall(array.data.cast("B"))
        except (OSError, ValueError) as error:
            raise WireError(_reason(error)) from None

    def receive(self, largest: int = _LARGEST_BODY) -> tuple[Head, list[NDArray[Any]]]:
        """Return the next frame; its arrays together have at most `largest` bytes.

        Raises:
            WireError: as said.
        """
        try:
            magic, head_size, size = _FRAME.unpack(self._read(_FRAME.size))
            if magic != _MAGIC or head_size > _LARGEST_HEAD or size > largest:
                raise WireError("it speaks another protocol")
            head = json.loads(self._read(head_size))
            body = np.empty(size, np.uint8)  # not filled with zeros, as a bytearray is
            self._read_into(body.data)
            arrays = _arrays(head["arrays"], body)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WireError(_reason(error)) from None
        if self.delay and (wait := float(head["sent"]) + self.delay - monotonic()) > 0:
            sleep(wait)
        return head, arrays

    def limit(self, seconds: float | None) -> None:
        """Give up where the other side is silent, or takes nothing, for so long; None: never."""
        self._socket.settimeout(seconds)

    def close(self) -> None:
        """End the connection, and whatever waits for it."""
        with suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        self._read_into(memoryview(data))
        return data

    def _read_into(self, view: memoryview) -> None:
        start, size = 0, len(view)
        while start < size:
            count = self._socket.recv_into(view[start:], min(size - start, 1 << 20))
            if not count:
                raise WireError("its connection ended")
            start += count


def _arrays(forms: Any, body: NDArray[np.uint8]) -> list[NDArray[Any]]:
    """Return the arrays of a body by their types and shapes."""
    arrays, start = [], 0
    for kind, shape in forms:
        dtype = _TYPES[kind]
        count = int(np.prod([int(size) for size in shape], dtype=np.int64))
        arrays.append(np.frombuffer(body, dtype, count, start).reshape(shape))
        start += count * dtype.itemsize
    if start != len(body):
        raise ValueError("a frame has more bytes than its arrays")
    return arrays


def _name(array: NDArray[Any]) -> str:
    return next(name for name, dtype in _TYPES.items() if dtype == array.dtype)


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it was silent for too long"
    return f"its connection failed: {error}" if isinstance(error, OSError) else str(error)
