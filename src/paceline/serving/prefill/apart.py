"""Decides which prompts of a worker are read apart, and adopts their pages between passes."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from math import inf
from time import perf_counter

import numpy as np

from paceline.engines.base import Cached, Engine
from paceline.engines.pages import PAGE
from paceline.errors import MemoryFullError
from paceline.serving.batch_entry import BatchEntry
from paceline.serving.drafter_pool import Slot
from paceline.serving.pass_runner import PassRunner
from paceline.serving.prefill.pool import PrefillPool
from paceline.serving.prefill.replica import Arrival, PrefillReplica
from paceline.serving.scheduler import ScheduledJob, Scheduler

_ATTEMPTS = 3  # replicas that may fail at a text before it is read here
_BESIDE = 2  # times as long as alone does a prompt take beside streams
_SHARE = 0.03  # of the time of a pass that adopting pages may take while others decode
_WAIT = 0.005  # seconds without anything to run after which requests are looked for again
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Reading:
    """A text that a replica reads.

    Attributes:
        number: of the text, as the replica knows it.
        id: of the request.
        replica: reads it.
        sequence: of the request; another one, or none, after it was preempted or has ended.
        end: positions that the replica gives, whole pages.
    """

    number: int
    id: str
    replica: PrefillReplica
    sequence: Cached
    end: int


class ReadingApart:
    """Hands the texts of requests to prefill replicas.

    Args:
        pool: the replicas.
        engine: of this process.
        scheduler: plans no part of what is read apart.
        runner: makes room for pages.
        slots: all requests by id, shared with the worker.
        report: reports a request's progress to the scheduler.
    """

    def __init__(
        self,
        pool: PrefillPool,
        engine: Engine,
        scheduler: Scheduler,
        runner: PassRunner,
        slots: Mapping[str, Slot],
        report: Callable[[str], None],
    ) -> None:
        self._pool, self._engine, self._scheduler = pool, engine, scheduler
        self._runner, self._slots, self._report = runner, slots, report
        self._readings: dict[str, _Reading] = {}  # by id of the request
        self._failed: Counter[str] = Counter()  # replicas that failed at a text
        self._numbers = count(1)
        self._assigned = 0.0  # when passes were last planned

    def adopt(self) -> list[BatchEntry]:
        """Append the pages that have come; return the requests that were read, or have failed.

        While others decode, it takes a small share of the time of a pass, but a page of each
        replica at least.
        """
        now = perf_counter()
        decodes = any(not job.missing for job in self._scheduler.running)
        end = now + (_SHARE * (now - self._assigned) if decodes else inf)
        ended: list[BatchEntry] = []
        for reading in list(self._readings.values()):
            if not self._current(reading):
                self.drop(reading.id)
        for replica in self._pool.replicas:
            more = True
            while more and (arrival := replica.take()) is not None:
                self._note(arrival, ended)
                more = perf_counter() < end
        for replica in self._pool.drop_lost():
            while (arrival := replica.take()) is not None:
                self._note(arrival, ended)
            for reading in [each for each in self._readings.values() if each.replica is replica]:
                self._give_up(reading)
        return ended

    def assign(self) -> None:
        """Hand texts of running requests to free replicas, the most important first.

        If all replicas are busy, a text waits while others decode, unless one that is read beside
        them, which takes about twice as long, would be read before any replica is free. While
        nobody decodes it is read here.
        """
        running = self._scheduler.running
        decodes = any(not job.missing for job in running)
        ahead = min((each.left for each in self._pool.replicas), default=0)
        for job in running:
            if job.id in self._readings:
                continue
            job.apart = False
            if not self._long(job):
                continue
            replica = self._pool.free()
            if replica is None:
                job.apart = decodes and _BESIDE * job.missing >= ahead > 0
                ahead += job.missing if job.apart else 0
            else:
                self._begin(job, replica)
        self._assigned = perf_counter()

    def drop(self, job_id: str) -> None:
        """Forget a request that has ended, or whose text is not wanted now."""
        self._failed.pop(job_id, None)
        reading = self._readings.pop(job_id, None)
        if reading is not None:
            reading.replica.cancel(reading.number)

    def wait(self) -> None:
        """Wait a moment for something to come, as there is nothing to run."""
        if any(job.apart for job in self._scheduler.running):
            self._pool.arrived.wait(_WAIT)
            self._pool.arrived.clear()

    def _current(self, reading: _Reading) -> bool:
        slot = self._slots.get(reading.id)
        return slot is not None and slot.run.sequence is reading.sequence

    def _long(self, job: ScheduledJob) -> bool:
        """Return whether enough of a text is missing, and nothing else than tokens made it."""
        slot = self._slots.get(job.id)
        if slot is None or slot.run.sequence is None or slot.run.request.own_cache:
            return False
        if self._failed[job.id] >= _ATTEMPTS:
            return False
        pages = _whole(len(slot.run.text) - 1) - _whole(slot.run.sequence.length)
        return pages >= max(self._pool.threshold, PAGE)

    def _begin(self, job: ScheduledJob, replica: PrefillReplica) -> None:
        """Let a replica read on from the last whole page that is held here."""
        run = self._slots[job.id].run
        sequence = run.sequence
        assert sequence is not None
        start, end = _whole(sequence.length), _whole(len(run.text) - 1)
        try:
            self._engine.truncate(sequence, start)
            held = self._engine.fork(sequence) if start else None
        except MemoryFullError:
            return
        self._report(job.id)
        number = next(self._numbers)
        self._readings[job.id] = _Reading(number, job.id, replica, sequence, end)
        job.apart = True
        replica.read(number, np.array(run.text[:end], np.int32), held, start)

    def _note(self, arrival: Arrival, ended: list[BatchEntry]) -> None:
        """Take what came for a text, unless that is not wanted any more."""
        self._pool.statistics.tokens += arrival.computed
        reading = next((r for r in self._readings.values() if r.number == arrival.job), None)
        if reading is None or not self._current(reading):
            return
        if arrival.error:
            _log.warning("a prompt is read elsewhere: %s", arrival.error)
        if arrival.data is None or reading.sequence.length != PAGE * (arrival.page or 0):
            self._give_up(reading)
            return
        entry = BatchEntry(reading.id, self._slots[reading.id].run)
        self._runner.append_page(entry, arrival.data)
        if entry.error is not None:
            ended.append(entry)
        elif entry.run.sequence is not None:
            self._pool.statistics.pages += 1
            self._report(reading.id)
            if reading.sequence.length == reading.end:
                self._end(reading)
                self._pool.statistics.prompts += 1
                ended.append(entry)

    def _give_up(self, reading: _Reading) -> None:
        """Let another replica go on, or this process."""
        self._end(reading)
        self._failed[reading.id] += 1
        self._pool.statistics.again += 1

    def _end(self, reading: _Reading) -> None:
        del self._readings[reading.id]
        if (job := self._scheduler.jobs.get(reading.id)) is not None:
            job.apart = False


def _whole(positions: int) -> int:
    """Return the positions of the whole pages among these."""
    return positions // PAGE * PAGE
