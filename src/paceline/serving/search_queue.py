"""Runs searches between the passes of a worker, one pass of one search at a time.

A strategy is written as a loop that calls its engine. Here it runs in a thread of its own, which is
awake only while the worker's thread waits for it, from one pass to the next: two threads never
compute at once, and a stream waits for one pass of a search at most. A search reports nothing
before its end, so one that is preempted simply starts over later.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from math import ceil
from threading import Semaphore, Thread
from time import monotonic, perf_counter
from typing import TYPE_CHECKING

from paceline.control.capabilities import RunsModel
from paceline.core import Output
from paceline.decoding.strategies.base import SearchOutput, Strategy, Task
from paceline.decoding.strategies.beam import Beam
from paceline.decoding.strategies.contrastive import ContrastiveSearch
from paceline.decoding.text_stream import TextStream, text_of
from paceline.engines.pages import Memory
from paceline.errors import PacelineError, RequestError
from paceline.serving.messages import FAILED_ALONE, Job, JobEvent, WorkerStats
from paceline.serving.prompt_scores import PromptScore
from paceline.serving.scheduler import BusyError
from paceline.serving.turn_taking import TurnTakingEngine

if TYPE_CHECKING:
    from paceline.lm import LM

_log = logging.getLogger(__name__)
_MAX_RUNNING = 4  # searches
_AGING = 30.0  # seconds of waiting that weigh as much as one step of priority


class SearchQueue:
    """The searches of a worker; used by the worker's thread only.

    Searches take turns and, next to other requests, use no more than their `share` of the time. A
    search starts when there is memory for all of it: the worker keeps `reserved` pages free.

    Args:
        lm: the model.
        queue: maximum number of waiting searches.
        pages: of the engine's memory that a search may need.
        relieve: makes room for a pass, or allows a later retry; returns False if that is in vain.
        stats: of the worker.
        share: seconds of searches for each second of other passes.
    """

    def __init__(
        self,
        lm: LM,
        queue: int,
        pages: int,
        relieve: Callable[[], bool],
        stats: WorkerStats,
        share: float = 1.0,
    ) -> None:
        self._lm, self._queue, self._pages = lm, queue, pages
        self._relieve, self._stats, self.share = relieve, stats, share
        self._credit = 0.0  # seconds that searches may use
        self._orders = count()
        self._begun: dict[str, int] = {}  # client -> its last search that began
        self.waiting: list[_QueuedSearch] = []
        self.running: deque[_QueuedSearch] = deque()

    @property
    def idle(self) -> bool:
        """Return whether no search waits or runs."""
        return not self.waiting and not self.running

    @property
    def reserved(self) -> int:
        """Return the pages kept for running searches, and for the next one that may start."""
        following = self._next()
        kept = sum(max(each.pages - each.held, 0) for each in self.running)
        return kept + (following.pages if following else 0)

    def submit(self, job: Job) -> None:
        """Submit a search.

        Raises:
            PacelineError: it cannot be run, or the queue is full.
        """
        assert job.strategy is not None
        search = _QueuedSearch(job, self._lm, self._relieve, next(self._orders), monotonic())
        if any(each.job.id == job.id for each in [*self.waiting, *self.running]):
            raise RequestError(f"a request {job.id!r} is running; give this one another name")
        if search.pages > self._pages:
            raise RequestError(
                f"the search may need {search.pages} pages of memory, and there are {self._pages}; "
                "ask for fewer hypotheses or tokens"
            )
        if len(self.waiting) >= self._queue:
            raise BusyError(f"{self._queue} searches wait already; try again later")
        self.waiting.append(search)

    def cancel(self, job_id: str) -> list[JobEvent]:
        """Cancel a search; return no event if it has ended already."""
        searches = [each for each in [*self.waiting, *self.running] if each.job.id == job_id]
        return [self._end(each, "cancelled") for each in searches]

    def close(self, finish: str, error: str = "") -> list[JobEvent]:
        """End all searches."""
        return [self._end(each, finish, error) for each in [*self.waiting, *self.running]]

    def give_way(self) -> bool:
        """Preempt the search that was submitted last; return False if none runs."""
        if not self.running:
            return False
        last = max(self.running, key=lambda search: search.order)
        self.running.remove(last)
        last.stop()
        self.waiting.append(last.again())
        self._stats.preempted += 1
        return True

    def step(self, pages: int, alone: bool) -> list[JobEvent]:
        """Run one pass of the next search.

        Args:
            pages: that can be had, the reserved ones included.
            alone: no other request runs or waits, so that there will never be more pages.
        """
        now = monotonic()
        late = [each for each in [*self.waiting, *self.running] if each.late(now)]
        events = [self._end(each, "deadline") for each in late]
        following = self._next()
        if following and (self.reserved <= pages or (alone and not self.running)):
            self._begin(following)
        if not self.running or (self._credit < 0 and not alone):
            return events
        search, start = self.running[0], perf_counter()
        self.running.rotate(-1)
        if search.step():
            events.append(self._end(search, "error"))
        if not alone:
            self._credit -= perf_counter() - start
        return events

    def worked(self, seconds: float) -> None:
        """Credit the time of a pass of other requests; credit does not accumulate."""
        self._credit = min(self._credit, 0.0) + self.share * seconds

    def _next(self) -> _QueuedSearch | None:
        """Return the search to start next: by priority, then by the client served longest ago."""
        if not self.waiting or len(self.running) >= _MAX_RUNNING:
            return None
        now = monotonic()
        return min(
            self.waiting,
            key=lambda each: (
                -each.job.priority - int((now - each.arrived) / _AGING),
                self._begun.get(each.job.client, -1),
                each.order,
            ),
        )

    def _begin(self, search: _QueuedSearch) -> None:
        self.waiting.remove(search)
        self.running.append(search)
        clients = {each.job.client for each in [*self.waiting, *self.running]}
        self._begun = {client: at for client, at in self._begun.items() if client in clients}
        self._begun[search.job.client] = next(self._orders)

    def _end(self, search: _QueuedSearch, finish: str, error: str = "") -> JobEvent:
        """Return the last event of a search; `finish` applies if it has no output."""
        if search in self.running:
            self.running.remove(search)
        else:
            self.waiting.remove(search)
        search.stop()
        if not search.outputs:
            if search.error is not None:
                error = error or self._message(search.job.id, search.error)
            return JobEvent(search.job.id, finish=finish, output=Output(), error=error)
        best = search.outputs[0]
        self._stats.passes += best.passes
        self._stats.nodes += best.nodes
        self._stats.tokens += sum(len(each.tokens) for each in search.outputs)
        event = JobEvent(search.job.id, finish=best.finish, output=best, outputs=search.outputs)
        return replace(event, logprobs=best.logprobs) if isinstance(best, PromptScore) else event

    def _message(self, job_id: str, error: Exception) -> str:
        if isinstance(error, PacelineError):
            return str(error)
        _log.error("request %s failed", job_id, exc_info=error)
        return FAILED_ALONE


class _QueuedSearch:
    """A search, and its thread once it has started."""

    def __init__(
        self, job: Job, lm: LM, relieve: Callable[[], bool], order: int, arrived: float
    ) -> None:
        assert job.strategy is not None
        self.job, self.order, self.arrived = job, order, arrived
        self.outputs: list[SearchOutput] = []
        self.error: Exception | None = None
        self._strategy, self._lm, self._relieve = job.strategy, lm, relieve
        self._engine = TurnTakingEngine(lm.engine, self._wait_for_turn, relieve)
        self._task = Task(self._engine, job.request, self._stream)
        self._strategy.check(self._task)
        self.pages = _pages(self._strategy, self._task)
        self._go, self._paused = Semaphore(0), Semaphore(0)
        self._thread: Thread | None = None
        self._leaving = self._over = False

    @property
    def held(self) -> int:
        """Return the pages that it holds."""
        return self._engine.held

    def late(self, now: float) -> bool:
        """Return whether its deadline has passed."""
        return self.job.deadline is not None and self.job.deadline <= now

    def again(self) -> _QueuedSearch:
        """Return the same search, not started."""
        return _QueuedSearch(self.job, self._lm, self._relieve, self.order, self.arrived)

    def step(self) -> bool:
        """Run up to the next pass; return whether the search has ended."""
        if self._thread is None:
            self._thread = Thread(target=self._work, name="paceline-search", daemon=True)
            self._thread.start()
        if not self._over:
            self._go.release()
            self._paused.acquire()
        if self._over:
            self._thread.join()
        return self._over

    def stop(self) -> None:
        """End the thread and release all memory."""
        self._leaving = True
        if self._thread is not None:
            self.step()

    def _work(self) -> None:
        self._go.acquire()
        try:
            self.outputs = self._strategy.run(self._task)
        except _LeavingError:
            pass
        except Exception as error:
            self.error = error
        finally:
            self._over = True
            self._paused.release()

    def _wait_for_turn(self) -> None:
        """Pause before each pass, and let the worker go on."""
        self._paused.release()
        self._go.acquire()
        if self._leaving:
            raise _LeavingError

    def _stream(self) -> TextStream:
        return text_of(self.job.request, self._lm.tokenizer)


class _LeavingError(Exception):
    """The search is cancelled."""


def _pages(strategy: Strategy, task: Task) -> int:
    """Return the pages that a search may come to hold.

    These are the prefix of each text once and the own pages of each hypothesis; those of guides are
    counted in pages of the model.
    """
    width = strategy.width if isinstance(strategy, Beam) else 1
    nodes = strategy.k if isinstance(strategy, ContrastiveSearch) else 1
    # Its last page, and the prompt's, are copied.
    prompt, page = len(task.request.prompt), task.engine.memory.page_bytes
    own = Memory.pages(task.limit + nodes) + 2 + task.engine.open_pages
    own += task.engine.prompt_pages(prompt)
    pages = Memory.pages(prompt) + width * own
    for guide in task.request.controls:
        for engine, size in guide.positions(prompt) if isinstance(guide, RunsModel) else ():
            beside = Memory.pages(size) + width * own
            pages += ceil(beside * engine.memory.page_bytes / page)
    return pages
