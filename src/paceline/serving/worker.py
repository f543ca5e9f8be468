"""Runs the passes of many requests on one engine, as the scheduler plans them.

All trees and parts of prompts of a pass are one batch. What a request gets does not depend on the
others: its tokens are drawn from its own rows by its own noise, and the engine's rows do not depend
on the batch. One thread drives a worker; `serving/service.py` has it.
"""

from __future__ import annotations

import logging
from functools import partial
from time import monotonic, perf_counter
from typing import TYPE_CHECKING

from paceline.core import Floats
from paceline.decoding.governor import Fixed, Governor
from paceline.decoding.loop import follows_rejection
from paceline.decoding.session import Session
from paceline.decoding.text_stream import text_of
from paceline.drafters.base import ModelBacked
from paceline.engines.cost_cache import known_cost
from paceline.engines.pages import PAGE
from paceline.errors import MemoryFullError, PacelineError, RequestError
from paceline.serving.batch_entry import BatchEntry
from paceline.serving.drafter_pool import DrafterPool, DrafterPools, Slot
from paceline.serving.kv_budget import KVBudget
from paceline.serving.messages import FAILED_ALONE, Job, JobEvent, WorkerStats
from paceline.serving.pass_budget import PassBudget, prefill_tokens
from paceline.serving.pass_runner import PassRunner
from paceline.serving.prefix_cache import PrefixCache
from paceline.serving.scheduler import ScheduledJob, Scheduler
from paceline.serving.search_queue import SearchQueue

if TYPE_CHECKING:
    from paceline.lm import LM

_LITTLE = 0.1  # of the time, for searches

_log = logging.getLogger(__name__)


class Worker:
    """See the module's text.

    Args:
        lm: the model, its drafter's method, and the budget of requests that name none.
        max_running: most requests that run at once.
        queue: most requests that wait.
        prefill_slowdown: a pass with parts of prompts may take so many times as long as without.
        memory: most bytes of keys and values, of drafters and guides, too; None takes a context of
            the model for each place, and as many for these as they want.
        prefix_cache: share of the memory that texts of the past may fill, for requests that begin
            alike; running requests can have it back.

    Raises:
        PacelineError: as `DrafterPool` and `known_cost`; or the memory cannot hold one request.
    """

    def __init__(
        self,
        lm: LM,
        max_running: int = 32,
        queue: int = 1024,
        prefill_slowdown: float = 2.0,
        memory: int | None = None,
        prefix_cache: float = 0.5,
    ) -> None:
        self.lm, self.prefill_slowdown, self.stats = lm, prefill_slowdown, WorkerStats()
        self.scheduler = Scheduler(max_running, queue=queue, loss=PAGE)
        self.memory = KVBudget(lm.engine, self.scheduler, memory, prefix_cache)
        self.memory.know(lm.guide_models.loaded, loaded=True)
        self._pools = DrafterPools(lm, known_cost(lm.engine), self.memory)
        self._budget = lm.budget.nodes if isinstance(lm.budget, Fixed) else None
        self._slots: dict[str, Slot] = {}
        self._runner = PassRunner(lm.engine, self.scheduler, self.memory, self._slots, self.stats)
        share = max(prefill_slowdown - 1, _LITTLE)
        half = self.scheduler.capacity // PAGE // 2
        self.searches = SearchQueue(lm, queue, half, self._runner.yields, self.stats, share)
        self._runner.give_way = self.searches.give_way

    @property
    def prefix_cache(self) -> PrefixCache:
        """Texts of the past."""
        return self.memory.prefix_cache

    @property
    def governor(self) -> Governor:
        """Sizes the trees of requests that name no drafter."""
        return self._pools.own.governor

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.scheduler.jobs and self.searches.idle

    def submit(self, job: Job) -> None:
        """Hand a request in.

        Raises:
            PacelineError: it cannot be run, or the queue is full.
        """
        if job.strategy is not None:
            self.searches.submit(job)
            return
        # Without a budget nothing is guessed, and nothing learnt from the prompt.
        used = [slot.pool for slot in self._slots.values()]
        pool = self._pools.of("plain" if self._budget_of(job) == 0 else job.drafter, used)
        first = pool.first
        if job.request.prediction and not first.uses_prediction and self._budget_of(job) != 0:
            raise RequestError(f"the drafter {job.drafter} has no use for a prediction")
        stream = text_of(job.request, self.lm.tokenizer)
        budget = self._budget_of(job)
        sized = pool.governor if budget is None else Fixed(budget)
        rejects = follows_rejection(job.request, first, sized)
        run = Session(self.lm.engine, first, job.request, stream, rejects=rejects)
        for guide in run.guides:
            self.memory.know(engine for engine, _ in guide.positions(len(job.request.prompt)))
        self.scheduler.submit(
            ScheduledJob(
                job.id,
                text=len(job.request.prompt),
                most=self.memory.most(run),
                cost=self.memory.cost(run),
                client=job.client,
                priority=job.priority,
                deadline=job.deadline,
                arrived=monotonic(),
                after=job.after,
            )
        )
        self._slots[job.id] = Slot(job, run, pool)

    def cancel(self, job_id: str) -> list[JobEvent]:
        """Give a request up; nothing comes of it where it is over already."""
        return self._end(job_id, "cancelled") or self.searches.cancel(job_id)

    def step(self) -> list[JobEvent]:
        """One pass; what came of it, and who is over."""
        events = []
        if not self.searches.idle:
            events = self.searches.step(self._free() // PAGE, not self.scheduler.jobs)
        begun = perf_counter()
        running = self.scheduler.running
        streams = sum(not job.missing for job in running)
        tokens = prefill_tokens(self.governor, streams, self.prefill_slowdown)
        free = self._free()
        # Those that run go on meanwhile, but none is admitted beside them.
        left = max(free - self.searches.reserved * PAGE, min(free, 2 * PAGE * len(running)))
        plan = self.scheduler.plan(monotonic(), left, tokens)
        events += [event for each in plan.expired for event in self._end(each, "deadline")]
        for each in plan.preempted:
            self._runner.preempt(each)
        events += [event for each in plan.admitted for event in self._open(each)]
        pass_budget = PassBudget(tokens, alone=not streams or len(self.scheduler.running) < 2)
        parts = [
            self._part(each, size, pass_budget)
            for each, size in plan.parts
            if each in self._slots and self._run(each).missing
        ]
        entries = [self._turn(each) for each in plan.decoding]
        every = [*parts, *entries]
        self._runner.make_room(parts, entries, plan.nodes)
        start = perf_counter()
        entries = self._runner.read(parts, entries, pass_budget)
        groups = self._groups(entries)
        other_tokens = sum(len(part.tree) for part in parts) + len(entries)
        follow = partial(self._runner.follow, pass_budget)
        for pool, group in groups:
            pool.draft(group, plan.nodes, other_tokens - len(group), follow)
        drafted = perf_counter()
        entries = self._runner.look(entries)
        looked = perf_counter()
        logits = self._runner.forward([*parts, *entries])
        passed = perf_counter()
        nodes = sum(len(entry.tree) for entry in every if entry.id in logits)
        for part in parts:
            if part.id in logits:
                self._ran(part, logits[part.id])
        for pool, group in groups:
            done = [entry for entry in group if entry.id in logits]
            pool.take_in(done, [logits[entry.id] for entry in done])
            pool.settle(done, passed - drafted, nodes)
        for entry in every:
            events += self._told(entry, logits.get(entry.id))
        self.stats.passes += bool(nodes)
        self.stats.nodes += nodes
        self.stats.draft += drafted - start
        self.stats.guide += looked - drafted
        self.stats.forward += passed - looked
        self.stats.walk += perf_counter() - passed
        self.searches.worked(perf_counter() - begun)
        return events

    def close(self, finish: str = "cancelled", error: str = "") -> list[JobEvent]:
        """Give everything up, texts of the past too."""
        events = [event for each in list(self._slots) for event in self._end(each, finish, error)]
        events += self.searches.close(finish, error)
        self.prefix_cache.clear()
        for drafter in self._pools.idle():
            if isinstance(drafter, ModelBacked):
                drafter.release()
        return events

    def _run(self, job_id: str) -> Session:
        return self._slots[job_id].run

    def _budget_of(self, job: Job) -> int | None:
        wished = self._budget if job.budget is None else job.budget
        return wished if isinstance(wished, int) else None

    def _groups(self, entries: list[BatchEntry]) -> list[tuple[DrafterPool, list[BatchEntry]]]:
        """The turns by where their drafters are from."""
        groups: dict[DrafterPool, list[BatchEntry]] = {}
        for entry in entries:
            groups.setdefault(self._slots[entry.id].pool, []).append(entry)
        return list(groups.items())

    def _free(self) -> int:
        """Positions of memory that can be had."""
        return self.memory.free([self._run(job.id) for job in self.scheduler.running])

    def _open(self, job_id: str) -> list[JobEvent]:
        slot = self._slots[job_id]
        try:
            if slot.drafter is None:
                slot.drafter = slot.run.drafter = slot.pool.take()
            try:
                sequence, slot.cached = self.prefix_cache.match(slot.run.text[:-1])
            except MemoryFullError:  # an engine that copies what it forks
                sequence, slot.cached = None, 0
            slot.run.open(sequence)
            slot.weigh(self.lm.engine)
        except Exception as error:
            return self._fail(job_id, error)
        self.stats.cached_tokens += slot.cached
        self._tell(job_id)
        return []

    def _part(self, job_id: str, size: int, pass_budget: PassBudget) -> BatchEntry:
        slot = self._slots[job_id]
        size = pass_budget.part(size, slot.guiding + slot.drafting)
        return BatchEntry(job_id, slot.run, tree=slot.run.next_part(size))

    def _turn(self, job_id: str) -> BatchEntry:
        slot = self._slots[job_id]
        budget = self._budget_of(slot.job)
        return BatchEntry(job_id, slot.run, budget, said=len(slot.run.output.tokens))

    def _tell(self, job_id: str) -> None:
        """Let the scheduler know where a request stands."""
        run = self._run(job_id)
        self.scheduler.ran(job_id, run.sequence.length if run.sequence else 0, len(run.text))

    def _ran(self, part: BatchEntry, logits: Floats) -> None:
        try:
            part.run.commit_part(part.tree, logits if len(logits) else None)
        except Exception as error:  # of a drafter that learns from prompts
            part.error = error
            return
        self.stats.prompt_tokens += len(part.tree)
        self._tell(part.id)
        if not part.run.missing:
            self._keep(part.run)

    def _keep(self, run: Session) -> None:
        """Let later requests begin with what this one has run."""
        if run.sequence:
            self.prefix_cache.insert(run.text[: run.sequence.length], run.sequence)

    def _told(self, entry: BatchEntry, logits: Floats | None) -> list[JobEvent]:
        """What a request is told after a pass."""
        if entry.error:
            return self._fail(entry.id, entry.error)
        if entry.walked is None or logits is None:
            return []
        run = entry.run
        event = entry.event(logits, self._slots[entry.id].job.logprobs)
        self.stats.count(event)
        if not run.done:
            self._tell(entry.id)
            return [event]
        return [event, *self._end(entry.id, run.output.finish)]

    def _fail(self, job_id: str, error: Exception) -> list[JobEvent]:
        """End a request alone: by its own fault, or by a bug in what works for it."""
        if isinstance(error, PacelineError):
            return self._end(job_id, "error", str(error))
        _log.error("request %s failed", job_id, exc_info=error)
        self._slots[job_id].drafter = None  # it may be the one that is broken
        return self._end(job_id, "error", FAILED_ALONE)

    def _end(self, job_id: str, finish: str, error: str = "") -> list[JobEvent]:
        slot = self._slots.pop(job_id, None)
        if slot is None:
            return []
        self.scheduler.finished(job_id)
        if finish != "error":
            self._keep(slot.run)
        try:
            slot.run.close()
        except Exception:
            _log.exception("request %s did not end well", job_id)
        if slot.drafter is not None:
            slot.pool.give(slot.drafter)
        for other in self._slots.values():
            other.parked = False
        output = slot.run.output
        output.finish = finish
        return [JobEvent(job_id, finish=finish, output=output, cached=slot.cached, error=error)]
