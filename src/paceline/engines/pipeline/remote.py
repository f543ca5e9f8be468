"""Stages in other processes, which connect to this one, and what waits for them."""

from __future__ import annotations

import secrets
import socket
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from threading import Lock, Thread
from time import monotonic
from typing import Any

import numpy as np

from paceline import errors
from paceline.core import Floats
from paceline.engines.pipeline.settings import NodeSettings
from paceline.engines.pipeline.stage import Nodes, Stage, StageEntry, StageLostError, check_alike
from paceline.engines.pipeline.wire import Head, Link, WireError
from paceline.errors import ModelError, PacelineError

_HELLO_SECONDS = 30.0  # for the first frame of a connection
_CONNECT_SECONDS = 180.0  # for a node to connect, of which Python takes some to start
_POLL_SECONDS = 0.2
_HELLO_BYTES = 1 << 16


class RemoteStage(Stage):
    """A stage behind a connection.

    Args:
        link: to the node, which has loaded its layers.
        name: of the node, for messages.
    """

    def __init__(self, link: Link, name: str) -> None:
        self._link, self._name = link, name
        self._waiting: deque[Future[Floats]] = deque()
        self._lock = Lock()
        self._thread = Thread(target=self._read, name="paceline-stage", daemon=True)
        self._thread.start()

    def change(self, operation: str, key: int, *values: int) -> None:
        """Tell the node to change its caches."""
        if self.lost is not None:
            return
        try:
            head = {"kind": "change", "operation": operation, "key": key}
            self._link.send(head, [np.array(values, np.int32)])
        except WireError as error:
            self._lose(str(error))

    def run(
        self, entries: Sequence[StageEntry], states: Floats | None, answer: bool = True
    ) -> Future[Floats]:
        """Send a pass to the node."""
        future: Future[Floats] = Future()
        with self._lock:
            if self.lost is not None:
                future.set_exception(self.lost)
                return future
            self._waiting.append(future)
        head = {"kind": "run", "keys": [entry.key for entry in entries], "answer": answer}
        trees = [part for entry in entries for part in (entry.tokens, entry.parents)]
        try:
            self._link.send(head, trees if states is None else [*trees, states])
        except WireError as error:
            self._lose(str(error))
        return future

    def close(self) -> None:
        """End the connection; the node ends with it."""
        self._lose("it was closed")
        self._thread.join()

    def _read(self) -> None:
        """Take the node's answers, until the connection ends."""
        try:
            while True:
                head, arrays = self._link.receive()
                kind = head.get("kind")
                if kind == "alive":
                    continue
                if kind not in ("done", "failed") or not self._waiting:
                    raise WireError("it speaks another protocol")
                with self._lock:
                    future = self._waiting.popleft()
                if kind == "failed":
                    future.set_exception(error_of(head, self._name))
                else:
                    future.set_result(arrays[0])
        except WireError as error:
            self._lose(str(error))
        except (IndexError, KeyError) as error:
            self._lose(f"it speaks another protocol: {error}")

    def _lose(self, reason: str) -> None:
        with self._lock:
            if self.lost is None:
                self.lost = StageLostError(f"{self._name} was lost: {reason}")
            waiting, self._waiting = self._waiting, deque()
        for future in waiting:
            future.set_exception(self.lost)
        self._link.close()


def error_of(head: Head, name: str) -> PacelineError:
    """Return the error that a node reports, of its kind, with the node's name."""
    kind = getattr(errors, str(head.get("error")), ModelError)
    known = isinstance(kind, type) and issubclass(kind, PacelineError)
    return (kind if known else ModelError)(f"{name}: {head.get('message')}")


class RemoteNodes(Nodes):
    """Starts nodes that connect to a socket of this process.

    Args:
        settings: what they load.
        host: address of this machine that they reach.
    """

    def __init__(self, settings: NodeSettings, host: str) -> None:
        self.settings, self._host = settings, host
        self._token = secrets.token_hex(16)
        self._listener: socket.socket | None = None

    @abstractmethod
    def launch(self, index: int, told: dict[str, Any]) -> None:
        """Start a node that calls `run_node(told)` of its module; end one that was there before.

        Raises:
            PacelineError: it cannot be started.
        """

    @abstractmethod
    def ended(self, index: int) -> str | None:
        """Return why a node that was started has ended; None: it runs."""

    def name(self, index: int) -> str:
        """Return what a node is called in messages."""
        return self.settings.name(index)

    def start(self, indices: Sequence[int]) -> list[Stage]:
        """Launch nodes, and wait until each has loaded its layers."""
        links = self.connect(indices)
        return [
            RemoteStage(link, self.name(index)) for index, link in zip(indices, links, strict=True)
        ]

    def connect(self, indices: Sequence[int]) -> list[Link]:
        """Launch nodes, and return a connection to each once it is ready.

        Raises:
            PacelineError: a node cannot be started or cannot load what it is told.
            StageLostError: a node ended meanwhile.
        """
        listener = self._listen()
        port = listener.getsockname()[1]
        for index in indices:
            told = self.settings.describe(index, self._host, port, self._token)
            self.launch(index, told)
        links: dict[int, Link] = {}
        try:
            self._accept(listener, indices, links)
            for index in indices:
                self._await_ready(index, links[index])
        except BaseException:
            for link in links.values():
                link.close()
            raise
        return [links[index] for index in indices]

    def _listen(self) -> socket.socket:
        if self._listener is None:
            family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
            self._listener = socket.socket(family)
            self._listener.bind((self._host, 0))
            self._listener.listen()
            self._listener.settimeout(_POLL_SECONDS)
        return self._listener

    def _accept(
        self, listener: socket.socket, indices: Sequence[int], links: dict[int, Link]
    ) -> None:
        """Accept a connection of each node."""
        deadline = monotonic() + _CONNECT_SECONDS
        while missing := [index for index in indices if index not in links]:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                for index in missing:
                    if (reason := self.ended(index)) is not None:
                        raise StageLostError(f"{self.name(index)} {reason}") from None
                if monotonic() > deadline:
                    raise ModelError(
                        f"{self.name(missing[0])} did not connect to {self._host} within "
                        f"{_CONNECT_SECONDS:.0f} seconds; check that it can reach this machine"
                    ) from None
                continue
            link = Link(connection, self.settings.hop_seconds)
            index = self._greeted(link)
            if index in missing:
                links[index] = link
            else:
                link.close()

    def _greeted(self, link: Link) -> int:
        """Return the index of a node that has just connected; -1 for somebody else."""
        link.limit(_HELLO_SECONDS)
        try:
            head, _ = link.receive(_HELLO_BYTES)
        except WireError:
            return -1
        link.limit(self.settings.silence)
        token, index = head.get("token"), head.get("index")
        known = isinstance(token, str) and secrets.compare_digest(token, self._token)
        return index if known and isinstance(index, int) else -1

    def _await_ready(self, index: int, link: Link) -> None:
        """Wait until a node has loaded its layers; refuse one that is not like this process.

        Raises:
            PacelineError: it cannot load them, or has another model.
            StageLostError: it ended.
        """
        while True:
            try:
                head, _ = link.receive()
            except WireError as error:
                reason = self.ended(index) or f"was lost while it loaded: {error}"
                raise StageLostError(f"{self.name(index)} {reason}") from None
            if head["kind"] == "failed":
                raise error_of(head, self.name(index))
            if head["kind"] == "ready":
                check_alike(self.name(index), self.settings.facts, head["facts"])
                return

    def close(self) -> None:
        """Close the socket; the nodes end with their connections."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
