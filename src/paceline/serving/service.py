"""A worker in a thread of its own, for callers that live in an event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Protocol

from paceline.engines.pages import Memory
from paceline.errors import PacelineError
from paceline.serving.messages import FAILED, Job, JobEvent
from paceline.serving.scheduler import BusyError
from paceline.serving.worker import Worker

_log = logging.getLogger(__name__)
_Sink = Callable[[JobEvent], None]
_WAITING = 64  # events that a reader may be behind before they are merged


class StoppingError(BusyError):
    """The service is about to stop."""


class Observer(Protocol):
    """Sees every request; called in the worker's thread, so it must be quick."""

    def took(self, job: Job) -> None:
        """A request was handed in."""

    def saw(self, job: Job, event: JobEvent) -> None:
        """Something came of it; with a `finish`, for the last time."""


@dataclass(frozen=True, slots=True)
class ServiceLoad:
    """How much there is to do: requests without and with a place, pages, and bytes of guides."""

    waiting: int = 0
    running: int = 0
    memory: Memory | None = None
    guides: int = 0


class Mailbox:
    """Events on their way to one reader, in its loop.

    A reader that is slow gets fewer, larger events: their text, tokens and log probabilities are
    joined, and of their trees the last is left. So what waits for it is bounded by its answer.
    """

    def __init__(self) -> None:
        self._events: deque[JobEvent] = deque()
        self._some = asyncio.Event()

    def put(self, event: JobEvent) -> None:
        """Deliver."""
        if len(self._events) >= _WAITING:
            event = merged(self._events.pop(), event)
        self._events.append(event)
        self._some.set()

    async def get(self) -> JobEvent:
        """The next; waits for it."""
        while not self._events:
            self._some.clear()
            await self._some.wait()
        return self._events.popleft()


def merged(first: JobEvent, then: JobEvent) -> JobEvent:
    """Two events of a request as one."""
    return replace(
        then,
        text=first.text + then.text,
        texts=first.texts + then.texts,
        tokens=first.tokens + then.tokens,
        origins=first.origins + then.origins,
        logprobs=first.logprobs + then.logprobs,
        tree=then.tree or first.tree,
        path=then.path or first.path,
        sources=then.sources or first.sources,
        at=then.at or first.at,
        passes=first.passes + then.passes,
    )


class EventStream(AsyncIterator[JobEvent]):
    """What comes of a request. To close it before its end, or to let it go, cancels the request.

    Args:
        events: as they come.
        leave: cancels.
    """

    def __init__(self, events: Mailbox, leave: Callable[[], None]) -> None:
        self._events, self._leave = events, leave
        self._over = False

    async def __anext__(self) -> JobEvent:
        if self._over:
            raise StopAsyncIteration
        try:
            event = await self._events.get()
        except BaseException:
            self._close()
            raise
        self._over = event.finish is not None
        return event

    async def aclose(self) -> None:
        """Leave."""
        self._close()

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        if not self._over:
            self._over = True
            self._leave()


class Service:
    """Takes requests from any event loop; a thread runs the passes.

    Args:
        worker: nobody else may use it once the service is started.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._sinks: dict[str, tuple[Job, _Sink]] = {}
        self._thread = threading.Thread(target=self._work, name="paceline-worker", daemon=True)
        self._stopped = self._draining = self._ended = False
        self.failures = 0
        self.load = ServiceLoad()
        self.observers: list[Observer] = []

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._draining

    @property
    def draining(self) -> bool:
        """Whether no more requests are taken."""
        return self._draining

    @property
    def idle(self) -> bool:
        """Whether everybody was told the end."""
        return not self._sinks

    def drain(self) -> None:
        """Take no more requests; those under way go on."""
        self._draining = True

    async def stream(self, job: Job) -> EventStream:
        """Hand a request in, wait until it is taken, and return what comes of it.

        Whoever leaves the iteration before its end, or never begins it, cancels the request; no
        later than after the pass that is under way it is gone.

        Raises:
            PacelineError: it cannot be run.
            BusyError: there are too many.
            StoppingError: the service is about to stop.
        """
        loop = asyncio.get_running_loop()
        events = Mailbox()
        taken: asyncio.Future[None] = loop.create_future()

        def settle(error: Exception | None) -> None:
            if not taken.done():
                taken.set_exception(error) if error else taken.set_result(None)

        def submit() -> None:
            try:
                if self._draining:
                    raise StoppingError("the server is about to stop; try another")
                self.worker.submit(job)
            except Exception as error:
                if not isinstance(error, PacelineError):  # a bug, but nobody else's
                    _log.exception("request %s was not taken", job.id)
                _post(loop, settle, error)
                return
            self._sinks[job.id] = job, lambda e: _post(loop, events.put, e)
            _post(loop, settle, None)
            for observer in self.observers:
                observer.took(job)

        self._inbox.put(submit)
        if self._ended:
            self._commands(wait=False)  # nobody else will answer
        try:
            await taken
        except asyncio.CancelledError:
            self.cancel(job.id)
            raise
        return EventStream(events, lambda: self.cancel(job.id))

    def cancel(self, job_id: str) -> None:
        """Give a request up, from any thread."""
        self._inbox.put(lambda: self._send(self.worker.cancel(job_id)))

    def stop(self, seconds: float = 0.0) -> None:
        """Take no more requests, give those under way so many seconds, and end the thread."""
        self._draining = True
        end = monotonic() + seconds
        if not self._thread.is_alive():
            self._end()
            return

        def leave() -> None:
            if not self.worker.idle and monotonic() < end:
                later.put(leave)
                return
            self._send(self.worker.close())
            self._stopped = True

        later = self._inbox
        later.put(leave)
        self._thread.join()

    def _work(self) -> None:
        try:
            while not self._stopped:
                try:
                    self._weigh()
                    self._commands(wait=self.worker.idle)
                    if not self._stopped and not self.worker.idle:
                        self._send(self.worker.step())
                except Exception:
                    # A bug. Those under way are told; those to come may fare better.
                    _log.exception("a pass failed")
                    self.failures += 1
                    self._send(self.worker.close("error", FAILED))
        finally:
            self._end()

    def _end(self) -> None:
        """Nobody works any more: refuse those that come, and tell those that are left."""
        self._draining = self._ended = True  # first, so that no command falls between
        self._commands(wait=False)
        self._send([JobEvent(each, finish="error", error=FAILED) for each in list(self._sinks)])

    def _weigh(self) -> None:
        """Look at the load here, where nobody changes it meanwhile."""
        running, searches = len(self.worker.scheduler.running), self.worker.searches
        waiting = len(self.worker.scheduler.jobs) - running + len(searches.waiting)
        running += len(searches.running)
        lm = self.worker.lm
        beside = [engine.memory for engine in lm.guide_models.loaded]
        guides = sum(memory.used * memory.page_bytes for memory in beside)
        self.load = ServiceLoad(waiting, running, lm.engine.memory, guides)

    def _commands(self, wait: bool) -> None:
        """Do what was asked for since the last pass."""
        for _ in range(self._inbox.qsize() or wait):
            try:
                command = self._inbox.get(timeout=None if wait else 0.0)
            except Empty:
                return
            command()
            wait = False

    def _send(self, events: list[JobEvent]) -> None:
        for event in events:
            if event.id not in self._sinks:
                continue
            job, sink = self._sinks[event.id]
            if event.finish is not None:
                del self._sinks[event.id]
            for observer in self.observers:
                observer.saw(job, event)
            sink(event)


def _post(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *args: object) -> None:
    """Call something in a loop, which may be closed by now: then nobody listens."""
    try:
        loop.call_soon_threadsafe(call, *args)
    except RuntimeError:
        _log.debug("an event found its loop closed")
