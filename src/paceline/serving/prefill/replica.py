"""A prefill replica as the decoding process sees it: one prompt at a time over a connection."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from queue import Empty, Full, Queue
from threading import Event, Lock, Thread
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from paceline.core import Tokens
from paceline.engines.base import Cached, Engine
from paceline.engines.pages import PAGE
from paceline.engines.pipeline.wire import Head, Link, WireError
from paceline.errors import PacelineError

_AHEAD = 16  # pages that wait to be adopted; more wait in the replica
_POLL = 0.2  # seconds
_log = logging.getLogger(__name__)


class Arrival(NamedTuple):
    """Something that a replica sent for a prompt.

    Attributes:
        job: number of the prompt.
        page: index of a page; None at the end.
        data: uint8 [page_bytes] of the page.
        computed: tokens that the replica ran, at the end.
        error: why it could not go on, at the end; empty where it could.
    """

    job: int
    page: int | None = None
    data: NDArray[np.uint8] | None = None
    computed: int = 0
    error: str = ""


@dataclass(eq=False)
class _Prompt:
    """The prompt that a replica reads.

    Attributes:
        job: its number.
        start: positions that this process holds.
        end: positions that it will hold.
        held: a sequence of this process with the first `start`; None once it is not needed.
        page: index of the next page to come.
        wanted: False once it was cancelled.
    """

    job: int
    start: int
    end: int
    held: Cached | None
    page: int
    wanted: bool = True


class PrefillReplica:
    """Sends prompts to a replica and takes their pages, in a thread of its own.

    Args:
        link: to the replica, which is ready.
        name: of the replica, for messages.
        engine: of this process; gives pages that the replica does not hold.
        arrived: is set when something came, or the replica was lost.

    Attributes:
        lost: why it cannot be used any more; None: it can.
        received: bytes of pages that came.
        sent: bytes of pages that went there.
    """

    def __init__(self, link: Link, name: str, engine: Engine, arrived: Event) -> None:
        self.name, self.lost, self.received, self.sent = name, "", 0, 0
        self._link, self._engine, self._arrived = link, engine, arrived
        self._page_bytes = engine.memory.page_bytes
        self._arrivals: Queue[Arrival] = Queue(_AHEAD)
        self._prompt: _Prompt | None = None
        self._lock = Lock()
        self._thread = Thread(target=self._receive, name="paceline-prefill", daemon=True)
        self._thread.start()

    @property
    def free(self) -> bool:
        """Whether it can be given a prompt."""
        return self._prompt is None and not self.lost

    @property
    def left(self) -> int:
        """Tokens of its prompt whose pages are still to come."""
        prompt = self._prompt
        return 0 if prompt is None else prompt.end - prompt.page * PAGE

    def read(self, job: int, tokens: Tokens, held: Cached | None, start: int) -> None:
        """Begin to read a prompt; call it on a `free` replica only.

        Args:
            job: number that tells it from all others.
            tokens: int32 [S], whole pages.
            held: sequence of this engine with the first `start` tokens; released here.
            start: multiple of `PAGE` below S.
        """
        prompt = _Prompt(job, start, len(tokens), held, start // PAGE)
        with self._lock:
            self._prompt = prompt
        try:
            self._link.send({"kind": "read", "job": job, "start": start}, [tokens])
        except WireError as error:
            self._lose(str(error))
            self._release()  # the thread may have ended before

    def cancel(self, job: int) -> None:
        """Stop reading a prompt; the replica is free when it has answered."""
        with self._lock:
            if self._prompt is None or self._prompt.job != job or not self._prompt.wanted:
                return
            self._prompt.wanted = False
        try:
            self._link.send({"kind": "cancel", "job": job})
        except WireError as error:
            self._lose(str(error))

    def take(self) -> Arrival | None:
        """Return the next thing that arrived; None: there is none now."""
        try:
            return self._arrivals.get_nowait()
        except Empty:
            return None

    def close(self) -> None:
        """End the connection; the replica ends with it."""
        self._lose("it was closed")
        self._thread.join()

    def _receive(self) -> None:
        try:
            while True:
                head, arrays = self._link.receive(self._page_bytes)
                if head.get("kind") != "alive":
                    self._note(head, arrays)
        except WireError as error:
            self._lose(str(error))
        except PacelineError as error:  # of the engine, whose page was to be sent
            self._lose(f"it could not be sent a page: {error}")
        except Exception:
            _log.exception("%s is given up", self.name)
            self._lose("what it sent could not be used")
        finally:
            self._release()

    def _note(self, head: Head, arrays: list[NDArray[Any]]) -> None:
        """Take a frame that belongs to the prompt under way.

        Raises:
            WireError: it does not.
        """
        prompt, kind = self._prompt, head.get("kind")
        if prompt is None or head.get("job") != prompt.job:
            raise WireError("it speaks of another prompt")
        if kind == "holds":
            self._send_pages(prompt, head.get("positions"))
        elif kind == "page":
            self._take_page(prompt, head, arrays)
        elif kind == "done" and (not prompt.wanted or prompt.page * PAGE == prompt.end):
            self._end(prompt, Arrival(prompt.job, computed=_count(head.get("computed"))))
        elif kind == "cancelled" and not prompt.wanted:
            self._end(prompt, None)
        elif kind == "failed":
            said = str(head.get("message"))[:500]
            self._end(prompt, Arrival(prompt.job, error=f"{self.name}: {said}"))
        else:
            raise WireError("it speaks another protocol")

    def _send_pages(self, prompt: _Prompt, positions: object) -> None:
        """Send the pages before the start that the replica does not hold."""
        first = _count(positions)
        if first % PAGE:
            raise WireError("it speaks another protocol")
        for page in range(first // PAGE, prompt.start // PAGE):
            if prompt.held is None or not prompt.wanted:
                break
            data = self._engine.read_page(prompt.held, page)
            self._link.send({"kind": "page", "job": prompt.job, "page": page}, [data])
            self.sent += data.nbytes
        self._release()

    def _take_page(self, prompt: _Prompt, head: Head, arrays: list[NDArray[Any]]) -> None:
        if head.get("page") != prompt.page or prompt.page * PAGE >= prompt.end:
            raise WireError("it sent pages in another order")
        if (
            len(arrays) != 1
            or arrays[0].dtype != np.uint8
            or arrays[0].shape != (self._page_bytes,)
        ):
            raise WireError("it sent a page of another size")
        prompt.page += 1
        self.received += arrays[0].nbytes
        if prompt.wanted:
            self._put(Arrival(prompt.job, prompt.page - 1, arrays[0]))

    def _end(self, prompt: _Prompt, last: Arrival | None) -> None:
        self._release()
        with self._lock:
            self._prompt = None  # first, so that the next prompt finds the replica free
        if last is not None and prompt.wanted:
            self._put(last)
        self._arrived.set()

    def _put(self, arrival: Arrival) -> None:
        while not self.lost:
            try:
                self._arrivals.put(arrival, timeout=_POLL)
                break
            except Full:
                continue
        self._arrived.set()

    def _release(self) -> None:
        """Give back the sequence whose pages the replica may have needed."""
        with self._lock:
            prompt = self._prompt
            held = None if prompt is None else prompt.held
            if prompt is not None:
                prompt.held = None
        if held is not None:
            self._engine.release(held)

    def _lose(self, reason: str) -> None:
        with self._lock:
            self.lost = self.lost or f"{self.name} was lost: {reason}"
        self._link.close()
        self._arrived.set()


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise WireError("it speaks another protocol")
    return value
