"""A prefill replica: reads prompts, and hands over their pages of keys and values.

`python -m paceline.serving.prefill.node` reads what it is told as JSON from its input. Frames that
it takes: `read` (`job`, `start`, the tokens), `page` (`job`, `page`, bytes of a page before
`start`), `cancel` (`job`). Frames that it sends for a job, in this order: `holds` (`positions` of
its own prefix cache), `page` (`page`, its bytes) for each page from `start` on, then `done`
(`computed` tokens), `cancelled` or `failed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from queue import Empty, Queue
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.core import Tokens, TokenTree
from paceline.engines.base import Cached, Engine
from paceline.engines.pages import PAGE
from paceline.engines.pipeline.wire import Head, Link, WireError
from paceline.engines.pipeline.worker import (
    connected,
    failure,
    main,
    open_checkpoint,
    open_part,
    report_loading,
)
from paceline.errors import MemoryFullError, PacelineError, RequestError
from paceline.serving.kv_budget import default_room, room
from paceline.serving.prefill.settings import prefill_facts
from paceline.serving.prefix_cache import PrefixCache

CHUNK = 128  # tokens of a pass: as fast as longer ones, and pages come more evenly
_TEXTS = 2  # contexts of the model whose keys and values are kept where no memory is given
_AHEAD = 16  # frames that wait to be sent, or to be used
_POLL = 0.1  # seconds

_Frame = tuple[Head, list[NDArray[Any]]]


class CancelledError(Exception):
    """The prompt is not wanted any more."""


class PromptReader:
    """Reads prompts on an engine and keeps them in a prefix cache.

    Args:
        engine: holds the whole model.
        memory: most bytes of this process; None: see `default_room`.

    Raises:
        RequestError: the memory is too small.
    """

    def __init__(self, engine: Engine, memory: int | None) -> None:
        self.engine = engine
        total = default_room(engine, _TEXTS) if memory is None else room(memory, engine)
        engine.kv_limit = total
        self.cache = PrefixCache(engine, total // engine.memory.page_bytes)

    def match(self, tokens: Tokens) -> Cached:
        """Return a sequence with the whole pages of `tokens` [S] that the cache holds."""
        sequence, length = self.cache.match(tokens)
        self.engine.truncate(sequence, length // PAGE * PAGE)
        return sequence

    def append(self, sequence: Cached, page: NDArray[np.uint8]) -> None:
        """Append a page that another process computed, uint8 [page_bytes].

        Raises:
            RequestError: it is no page of this engine.
            MemoryFullError: there is no room.
        """
        while True:
            try:
                self.engine.append_page(sequence, page)
                return
            except MemoryFullError:
                if not self.cache.shrink(1):
                    raise

    def extend(self, sequence: Cached, tokens: Tokens) -> int:
        """Run the next `CHUNK` of `tokens` [S]; return their number.

        Raises:
            RequestError, MemoryFullError: as `Engine.forward`.
        """
        start = sequence.length
        tree = TokenTree.chain(tokens[start : start + CHUNK])
        while True:
            try:
                self.engine.forward([(sequence, tree)], "none")
                break
            except MemoryFullError:
                if not self.cache.shrink(len(tree) // PAGE + 1):
                    raise
        self.engine.commit(sequence, np.arange(len(tree), dtype=np.int32))
        return len(tree)


class NodeServer:
    """Carries out what the decoding process sends, one prompt after the other.

    Args:
        link: to the decoding process.
        reader: reads the prompts.
    """

    def __init__(self, link: Link, reader: PromptReader) -> None:
        self._link, self._reader = link, reader
        self._inbox: Queue[_Frame | WireError] = Queue(_AHEAD)
        self._outbox: Queue[_Frame | None] = Queue(_AHEAD)
        self._lost: WireError | None = None

    def run(self) -> None:
        """Serve until the connection ends.

        Raises:
            WireError: it has ended.
        """
        receiver = Thread(target=self._receive, name="paceline-prefill-in", daemon=True)
        sender = Thread(target=self._send, name="paceline-prefill-out", daemon=True)
        receiver.start()
        sender.start()
        try:
            self._serve()
        finally:
            self._link.close()
            self._outbox.put(None)
            while receiver.is_alive():  # it may wait until there is room
                with suppress(Empty):
                    self._inbox.get(timeout=_POLL)
            sender.join()

    def _serve(self) -> None:
        while True:
            head, arrays = self._next()
            if head["kind"] == "read":
                self._read(int(head["job"]), int(head["start"]), arrays)
            elif head["kind"] not in ("page", "cancel"):  # of a prompt that has ended
                raise WireError("it speaks another protocol")

    def _read(self, job: int, start: int, arrays: list[NDArray[Any]]) -> None:
        sequence: Cached | None = None
        try:
            tokens = _tokens(arrays, start)
            sequence = self._reader.match(tokens)
            self._put({"kind": "holds", "job": job, "positions": sequence.length})
            self._take_pages(job, sequence, start)
            computed = self._compute(job, sequence, start, tokens)
            self._reader.cache.insert(tokens, sequence)
            self._put({"kind": "done", "job": job, "computed": computed})
        except CancelledError:
            self._put({"kind": "cancelled", "job": job})
        except (PacelineError, MemoryError) as error:
            self._put(failure(error) | {"job": job})
        finally:
            if sequence is not None:
                self._reader.engine.release(sequence)

    def _take_pages(self, job: int, sequence: Cached, start: int) -> None:
        """Take the pages before `start` that this process does not hold."""
        while sequence.length < start:
            head, arrays = self._next()
            if head["kind"] == "cancel" and head["job"] == job:
                raise CancelledError
            if head["kind"] == "page" and head["job"] == job:
                if head["page"] != sequence.length // PAGE:
                    raise RequestError("a prefill replica was sent pages in another order")
                self._reader.append(sequence, arrays[0])

    def _compute(self, job: int, sequence: Cached, start: int, tokens: Tokens) -> int:
        """Run what is missing, and send each page from `start` on once it is full."""
        computed, sent = 0, start // PAGE
        while True:
            for page in range(sent, sequence.length // PAGE):
                data = self._reader.engine.read_page(sequence, page)
                self._put({"kind": "page", "job": job, "page": page}, [data])
            sent = max(sent, sequence.length // PAGE)
            if sequence.length >= len(tokens):
                return computed
            self._check_cancelled(job)
            computed += self._reader.extend(sequence, tokens)

    def _check_cancelled(self, job: int) -> None:
        try:
            frame = self._inbox.get_nowait()
        except Empty:
            return
        head, _ = self._opened(frame)
        if head["kind"] == "cancel" and head["job"] == job:
            raise CancelledError

    def _next(self) -> _Frame:
        return self._opened(self._inbox.get())

    def _opened(self, frame: _Frame | WireError) -> _Frame:
        if isinstance(frame, WireError):
            raise frame
        return frame

    def _put(self, head: Head, arrays: list[NDArray[Any]] | None = None) -> None:
        if self._lost is not None:
            raise self._lost
        self._outbox.put((head, arrays or []))

    def _receive(self) -> None:
        engine = self._reader.engine
        largest = max(engine.memory.page_bytes, 4 * engine.config.context)
        try:
            while True:
                head, arrays = self._link.receive(largest)
                if not {"kind", "job"} <= head.keys():
                    raise WireError("it speaks another protocol")
                self._inbox.put((head, arrays))
        except WireError as error:
            self._inbox.put(error)

    def _send(self) -> None:
        while (frame := self._outbox.get()) is not None:
            if self._lost is not None:
                continue  # the inbox tells that the connection has ended
            try:
                self._link.send(*frame)
            except WireError as error:
                self._lost = error


def _tokens(arrays: list[NDArray[Any]], start: int) -> Tokens:
    """Return the tokens [S] of a prompt.

    Raises:
        RequestError: they are not whole pages that go on behind `start`.
    """
    if len(arrays) != 1 or arrays[0].dtype != np.int32 or arrays[0].ndim != 1:
        raise RequestError("a prefill replica was sent no tokens")
    tokens = arrays[0]
    if len(tokens) % PAGE or start % PAGE or not 0 <= start < len(tokens):
        raise RequestError(
            f"a prefill replica was told to read {len(tokens)} tokens from {start} on, expected "
            f"multiples of {PAGE}"
        )
    return tokens


def run_node(told: Mapping[str, Any]) -> None:
    """Connect to the decoding process, load the model, and read prompts until that ends.

    Args:
        told: see `PrefillSettings.describe`.
    """
    connected(told, _load_and_serve)


def _load_and_serve(link: Link, told: Mapping[str, Any]) -> None:
    def load() -> tuple[PromptReader, dict[str, Any]]:
        model = open_checkpoint(told["model"], told["rope"])
        engine = open_part(model, told)
        return PromptReader(engine, told["memory"]), prefill_facts(model, engine)

    reader = report_loading(link, told["model"], load)
    if reader is not None:
        NodeServer(link, reader).run()


if __name__ == "__main__":
    main(run_node)
