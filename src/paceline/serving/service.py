"""Runs a worker in a thread of its own, for callers in an event loop."""

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

_QUIET = 0.5  # seconds without requests after which the task for idle times goes on
_log = logging.getLogger(__name__)
_Sink = Callable[[JobEvent], None]
_BACKLOG = 64  # events that a reader may lag behind before they are merged


class StoppingError(BusyError):
    """The service is shutting down."""


class Observer(Protocol):
    """Sees every request; it is called in the worker's thread, so it must be quick."""

    def on_submit(self, job: Job) -> None:
        """Record that a request was submitted."""

    def on_event(self, job: Job, event: JobEvent) -> None:
        """Record an event; one with a `finish` is the last of its request."""


class IdleTask(Protocol):
    """Work in short steps for when there are no requests; done in the worker's thread."""

    def step(self) -> bool:
        """Do a step; return whether there is more to do before the next request."""


@dataclass(frozen=True, slots=True)
class ServiceLoad:
    """The current load.

    Attributes:
        waiting: number of waiting requests.
        running: number of running requests.
        memory: pages of the model's engine.
        guides: bytes of keys and values of guide models.
    """

    waiting: int = 0
    running: int = 0
    memory: Memory | None = None
    guides: int = 0


class Mailbox:
    """Events on their way to one reader, in the reader's event loop.

    A slow reader gets fewer, larger events: their texts, tokens and log-probabilities are joined,
    and only the last tree is kept. So its backlog is bounded by the size of its answer.
    """

    def __init__(self) -> None:
        self._events: deque[JobEvent] = deque()
        self._some = asyncio.Event()

    def put(self, event: JobEvent) -> None:
        """Add an event."""
        if len(self._events) >= _BACKLOG:
            event = merged(self._events.pop(), event)
        self._events.append(event)
        self._some.set()

    async def get(self) -> JobEvent:
        """Wait for the next event and return it."""
        while not self._events:
            self._some.clear()
            await self._some.wait()
        return self._events.popleft()


def merged(first: JobEvent, then: JobEvent) -> JobEvent:
    """Return two successive events of a request as one."""
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
    """The events of a request. Closing it early, or dropping it, cancels the request.

    Args:
        events: where they arrive.
        leave: cancels the request.
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
        """Cancel the request if it has not ended."""
        self._close()

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        if not self._over:
            self._over = True
            self._leave()


class Service:
    """Takes requests from any event loop and runs them in one thread.

    Args:
        worker: must not be used by others once the service is started.

    Attributes:
        failures: passes that failed because of a bug.
        load: of the last pass.
        observers: see all requests.
        idle_tasks: are done after half a second without requests, one after the other.
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
        self.idle_tasks: list[IdleTask] = []
        self._pause: float | None = _QUIET  # before the next step; None: there is nothing to do

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Return whether requests are accepted."""
        return self._thread.is_alive() and not self._draining

    @property
    def draining(self) -> bool:
        """Return whether requests are refused because the service is shutting down."""
        return self._draining

    @property
    def idle(self) -> bool:
        """Return whether every request has got its last event."""
        return not self._sinks

    def drain(self) -> None:
        """Refuse new requests; running ones continue."""
        self._draining = True

    async def stream(self, job: Job) -> EventStream:
        """Submit a request, wait until it is accepted, and return its events.

        Leaving the iteration early, or never starting it, cancels the request; it is gone after the
        current pass at the latest.

        Raises:
            PacelineError: it cannot be run.
            BusyError: the queue is full.
            StoppingError: the service is shutting down.
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
                    raise StoppingError("the server is shutting down; try another")
                self.worker.submit(job)
            except Exception as error:
                if not isinstance(error, PacelineError):  # a bug, but other requests can go on
                    _log.exception("request %s was not taken", job.id)
                _post(loop, settle, error)
                return
            self._sinks[job.id] = job, lambda e: _post(loop, events.put, e)
            _post(loop, settle, None)
            for observer in self.observers:
                observer.on_submit(job)

        self._inbox.put(submit)
        if self._ended:
            self._commands(wait=False)  # the thread has ended
        try:
            await taken
        except asyncio.CancelledError:
            self.cancel(job.id)
            raise
        return EventStream(events, lambda: self.cancel(job.id))

    def cancel(self, job_id: str) -> None:
        """Cancel a request, from any thread."""
        self._inbox.put(lambda: self._send(self.worker.cancel(job_id)))

    def stop(self, seconds: float = 0.0) -> None:
        """Refuse new requests, give running ones `seconds` to finish, and end the thread."""
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
                    self._measure_load()
                    self._commands(wait=self.worker.idle)
                    if not self._stopped and not self.worker.idle:
                        self._send(self.worker.step())
                except Exception:
                    # A bug: end the running requests with an error; later ones may succeed.
                    _log.exception("a pass failed")
                    self.failures += 1
                    self._send(self.worker.close("error", FAILED))
        finally:
            self._end()

    def _end(self) -> None:
        """Refuse requests and end those that are left, after the thread has ended."""
        self._draining = self._ended = True  # first, so that no command is lost in between
        self._commands(wait=False)
        self._send([JobEvent(each, finish="error", error=FAILED) for each in list(self._sinks)])

    def _measure_load(self) -> None:
        """Measure the load in the worker's thread, where nothing changes it meanwhile."""
        running, searches = len(self.worker.scheduler.running), self.worker.searches
        waiting = len(self.worker.scheduler.jobs) - running + len(searches.waiting)
        running += len(searches.running)
        lm = self.worker.lm
        beside = [engine.memory for engine in lm.guide_models.loaded]
        guides = sum(memory.used * memory.page_bytes for memory in beside)
        self.load = ServiceLoad(waiting, running, lm.engine.memory, guides)

    def _commands(self, wait: bool) -> None:
        """Run the commands that were queued since the last pass."""
        for _ in range(self._inbox.qsize() or wait):
            pause = self._pause if self.idle_tasks else None
            try:
                command = self._inbox.get(timeout=pause if wait else 0.0)
            except Empty:
                if wait:
                    self._pause = 0.0 if self._do_idle_task() else None
                return
            command()
            wait, self._pause = False, _QUIET

    def _do_idle_task(self) -> bool:
        """Do a step of the first task that has one; return whether any had.

        A task that fails is given up.
        """
        for task in list(self.idle_tasks):
            try:
                if task.step():
                    return True
            except Exception:
                _log.exception("a task for idle times failed and is given up")
                self.idle_tasks.remove(task)
        return False

    def _send(self, events: list[JobEvent]) -> None:
        for event in events:
            if event.id not in self._sinks:
                continue
            job, sink = self._sinks[event.id]
            if event.finish is not None:
                del self._sinks[event.id]
            for observer in self.observers:
                observer.on_event(job, event)
            sink(event)


def _post(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *args: object) -> None:
    """Call a function in a loop; do nothing if the loop is closed, since nobody listens then."""
    try:
        loop.call_soon_threadsafe(call, *args)
    except RuntimeError:
        _log.debug("an event was dropped: its loop is closed")
