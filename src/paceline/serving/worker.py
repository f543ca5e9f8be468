"""Runs the passes of many requests on one engine, as the scheduler plans them.

All trees and prompt parts of a pass are one batch. A request's output does not depend on the other
requests: its tokens are drawn from its own logits with its own noise, and the engine's logits do
not depend on the batch. A worker belongs to one thread; `serving/service.py` runs it in one.
"""

from __future__ import annotations

import logging
from collections import deque
from functools import partial
from time import monotonic, perf_counter
from typing import TYPE_CHECKING

from paceline.compatibility import Side, check
from paceline.core import Cost
from paceline.decoding.governor import Fixed, Governor
from paceline.decoding.loop import follows_rejection
from paceline.decoding.session import Session
from paceline.decoding.text_stream import text_of
from paceline.drafters.base import DraftMethod, ModelBacked
from paceline.engines.base import Cached
from paceline.engines.cost_cache import cost_of
from paceline.engines.pages import PAGE
from paceline.engines.screened import Logits, coarse
from paceline.errors import MemoryFullError, PacelineError
from paceline.serving.batch_entry import BatchEntry
from paceline.serving.batch_pass import BatchPass, PoolTrees
from paceline.serving.drafter_pool import DrafterPool, DrafterPools, Slot
from paceline.serving.kv_budget import KVBudget
from paceline.serving.messages import FAILED_ALONE, Job, JobEvent, WorkerStats
from paceline.serving.pass_budget import PassBudget, prefill_tokens
from paceline.serving.pass_runner import PassRunner
from paceline.serving.prefill.apart import ReadingApart
from paceline.serving.prefill.pool import PrefillPool
from paceline.serving.prefix_cache import PrefixCache
from paceline.serving.scheduler import ScheduledJob, Scheduler
from paceline.serving.search_queue import SearchQueue

if TYPE_CHECKING:
    from paceline.lm import LM
    from paceline.models.trace import Trace

_MIN_SEARCH_SHARE = 0.1  # seconds of searches for each second of passes

_log = logging.getLogger(__name__)


class Worker:
    """Continuous batching with speculative decoding on one engine.

    Args:
        lm: the model, with the drafting method and budget of requests that give none.
        max_running: maximum number of running requests.
        queue: maximum number of waiting requests.
        prefill_slowdown: maximum time of a pass with prompt tokens, relative to one without.
        memory: maximum bytes of keys and values, those of draft models and guides included; None
            allows one context of the model for each running request, and does not limit draft
            models and guides.
        prefix_cache: share of the memory that cached prefixes may fill, 0 to 1; running requests
            can reclaim it. Prefixes are stored on disk, too, where `lm.pages` is given.
        prefill: replicas that read long prompts; it stays the caller's. None: all are read here.

    Attributes:
        prefill: see above.

    Raises:
        PacelineError: see `DrafterPool` and `cost_of`; or the memory cannot hold one request.
    """

    def __init__(
        self,
        lm: LM,
        max_running: int = 32,
        queue: int = 1024,
        prefill_slowdown: float = 2.0,
        memory: int | None = None,
        prefix_cache: float = 0.5,
        prefill: PrefillPool | None = None,
    ) -> None:
        self.prefill = prefill
        self.lm, self.prefill_slowdown, self.stats = lm, prefill_slowdown, WorkerStats()
        self.scheduler = Scheduler(max_running, queue=queue, loss=PAGE)
        self.memory = KVBudget(lm.engine, self.scheduler, memory, prefix_cache)
        self.memory.register(lm.guide_models.loaded, loaded=True)
        self._pools = DrafterPools(lm, cost_of(lm.engine), self.memory)
        if lm.pages is not None:
            self.memory.unwritten = lm.pages.give_way
        self._budget = lm.budget.nodes if isinstance(lm.budget, Fixed) else None
        self._slots: dict[str, Slot] = {}
        self._flights: deque[BatchPass] = deque()  # passes that were begun, the first one first
        self._runner = PassRunner(lm.engine, self.scheduler, self.memory, self._slots, self.stats)
        share = max(prefill_slowdown - 1, _MIN_SEARCH_SHARE)
        half = self.scheduler.capacity // PAGE // 2
        self.searches = SearchQueue(
            lm, queue, half, self._runner.reclaim_for_search, self.stats, share
        )
        self._runner.give_way = self.searches.give_way
        self._apart: ReadingApart | None = None
        if prefill is not None:
            self._apart = ReadingApart(
                prefill, lm.engine, self.scheduler, self._runner, self._slots, self._report
            )

    @property
    def prefix_cache(self) -> PrefixCache:
        """Return the cache of earlier texts."""
        return self.memory.prefix_cache

    @property
    def governor(self) -> Governor:
        """Return the governor of requests that use the model's own drafting method."""
        return self._pools.own.governor

    @property
    def default_budget(self) -> int | None:
        """Return the nodes beyond the root for requests that name none; None: a governor's."""
        return self._budget

    @property
    def idle(self) -> bool:
        """Return whether no request and no search is unfinished."""
        return not self.scheduler.jobs and self.searches.idle

    def submit(self, job: Job) -> None:
        """Submit a request.

        Raises:
            PacelineError: it cannot be run, or the queue is full.
        """
        if job.strategy is not None:
            self.searches.submit(job)
            return
        # With a budget of 0 the drafter never proposes, so it need not read the prompt either.
        used = [slot.pool for slot in self._slots.values()]
        pool = self._pools.of("plain" if self._budget_of(job) == 0 else job.drafter, used)
        if pool is self._pools.own and job.request.prediction and not pool.first.uses_prediction:
            pool = self._pools.configured
        first = pool.first
        if job.request.prediction and not first.uses_prediction and self._budget_of(job) != 0:
            drafter = f"the drafter {job.drafter}"
            check({Side.PREDICTION: "a prediction", Side.PREDICTION_FREE_DRAFTER: drafter})
        stream = text_of(job.request, self.lm.tokenizer)
        budget = self._budget_of(job)
        sized = pool.governor if budget is None else Fixed(budget)
        rejects = follows_rejection(job.request, first, sized)
        run = Session(self.lm.engine, first, job.request, stream, rejects=rejects)
        for guide in run.guides:
            self.memory.register(engine for engine, _ in guide.positions(len(job.request.prompt)))
        self.scheduler.submit(
            ScheduledJob(
                job.id,
                text=len(job.request.prompt),
                most=self.memory.max_positions(run),
                cost=self.memory.token_cost(run),
                client=job.client,
                priority=job.priority,
                deadline=job.deadline,
                arrived=monotonic(),
                after=job.after,
                max_rows=None if job.request.kv_policy is None else self.memory.max_positions(run),
            )
        )
        self._slots[job.id] = Slot(job, run, pool)

    def cancel(self, job_id: str) -> list[JobEvent]:
        """Cancel a request; return no event if it has ended already."""
        return self._end(job_id, "cancelled") or self.searches.cancel(job_id)

    def step(self) -> list[JobEvent]:
        """Begin a pass, more where the engine runs several at once, and end the first one.

        Each has five phases: schedule, draft, guide, forward, commit. Where several are under way,
        each has its share of the running requests, and the forward passes overlap.

        Returns:
            what happened to requests meanwhile, those that ended included.
        """
        events = self._step_search()
        begun = perf_counter()
        if self._apart is not None:
            events += self._adopt(self._apart)
        most = self.lm.engine.passes_in_flight
        while len(self._flights) < most and self._begin(events):
            pass
        if self._flights:
            events += self._finish(self._flights[0])
        self.searches.worked(perf_counter() - begun)
        return events

    def _begin(self, events: list[JobEvent]) -> bool:
        """Schedule, draft and begin a pass; return whether there was anything to run.

        Args:
            events: requests that end before the pass are added.
        """
        if self._flights and not self._unoccupied():
            return False
        batch = self._schedule(events)
        if not batch.entries:
            return False
        scheduled = perf_counter()
        self._draft(batch)
        drafted = perf_counter()
        batch.ready = self._runner.run_guides(batch.ready)
        guided = perf_counter()
        batch.started, batch.begun = self._runner.begin([*batch.parts, *batch.ready]), drafted
        self._flights.append(batch)
        self.stats.draft += drafted - scheduled
        self.stats.guide += guided - drafted
        self.stats.forward += perf_counter() - guided
        return True

    def _finish(self, batch: BatchPass) -> list[JobEvent]:
        """Wait for the logits of a pass, and commit what follows from them."""
        assert batch.started is not None
        begun = perf_counter()
        logits = self._runner.finish(batch.started)
        self._flights.popleft()
        passed = perf_counter()
        events = self._commit(batch, logits, passed - batch.begun)
        self.stats.forward += passed - begun
        self.stats.walk += perf_counter() - passed
        return events

    def _unoccupied(self) -> bool:
        """Return whether a request is in no pass that is under way."""
        busy = self._busy()
        return any(job not in busy for job in self.scheduler.jobs)

    def _busy(self) -> set[str]:
        """Return the requests in passes that are under way."""
        return {entry.id for batch in self._flights for entry in batch.entries}

    def switch(self, method: DraftMethod, budget: int | None, cost: Cost | None = None) -> None:
        """Draft with another method and budget for requests that name none, from now on.

        No answer changes by it.

        Args:
            method: an exact one that runs no models of its own.
            budget: nodes beyond the root; None leaves them to the governor.
            cost: T(n) from now on, where passes have become faster; None leaves it.
        """
        self._pools.switch(method, cost)
        self._budget = budget

    def learn(self, trace: Trace) -> None:
        """Let drafters learn from what the model wrote by itself; there is no request.

        No answer changes by it.
        """
        self._pools.learn(trace)

    def close(self, finish: str = "cancelled", error: str = "") -> list[JobEvent]:
        """End all requests, and clear the prefix cache."""
        while self._flights:
            if (started := self._flights.popleft().started) is not None:
                self._runner.abandon(started)
        events = [event for each in list(self._slots) for event in self._end(each, finish, error)]
        events += self.searches.close(finish, error)
        self.prefix_cache.clear()
        for drafter in self._pools.idle():
            if isinstance(drafter, ModelBacked):
                drafter.release()
        return events

    def _step_search(self) -> list[JobEvent]:
        """Run one pass of a search, if there is one."""
        if self.searches.idle:
            return []
        return self.searches.step(self._free() // PAGE, not self.scheduler.jobs)

    def _schedule(self, events: list[JobEvent]) -> BatchPass:
        """Decide what the next pass runs, and reclaim memory for it.

        Args:
            events: requests that end before the pass are added.
        """
        running, shares = self.scheduler.running, self.lm.engine.passes_in_flight
        streams = sum(not job.missing for job in running)
        tokens = prefill_tokens(self.governor, -(-streams // shares), self.prefill_slowdown)
        waiting = [entry for batch in self._flights for entry in batch.waiting()]
        free = self._free() - sum(len(each.tree) for each in waiting)
        # Pages of the next search are kept: running requests go on, but none is admitted meanwhile.
        left = max(free - self.searches.reserved * PAGE, min(free, 2 * PAGE * len(running)))
        plan = self.scheduler.plan(monotonic(), left, tokens, self._busy(), shares)
        for each in plan.expired:
            events += self._end(each, "deadline")
        for each in plan.preempted:
            self._runner.preempt(each)
        for each in plan.admitted:
            events += self._open(each)
        if self._apart is not None:
            self._apart.assign()
        pass_budget = PassBudget(tokens, alone=not streams or len(self.scheduler.running) < 2)
        parts = [
            self._part(each, size, pass_budget)
            for each, size in plan.parts
            if each in self._slots
            and self._run(each).sequence
            and self._run(each).missing
            and not self.scheduler.jobs[each].apart
        ]
        decoding = [self._entry(each) for each in plan.decoding if self._run(each).sequence]
        if self._apart is not None and not parts and not decoding and not self._flights:
            self._apart.wait()
        self._runner.make_room(parts, decoding, plan.nodes, waiting)
        return BatchPass(parts, decoding, plan.nodes, pass_budget)

    def _adopt(self, apart: ReadingApart) -> list[JobEvent]:
        """Take the pages that prefill replicas have sent."""
        events: list[JobEvent] = []
        for entry in apart.adopt():
            if entry.error is not None:
                events += self._fail(entry.id, entry.error)
            elif entry.run.sequence is not None and not entry.run.missing:
                self._keep(entry.run)
                self._store(entry.run)
        return events

    def _draft(self, batch: BatchPass) -> None:
        """Draft a tree for each decoding request; group them by the pool of their drafter."""
        batch.ready = self._runner.prefill_models(batch.parts, batch.decoding, batch.budget)
        groups: dict[DrafterPool, list[BatchEntry]] = {}
        for entry in batch.ready:
            groups.setdefault(self._slots[entry.id].pool, []).append(entry)
        other_tokens = sum(len(part.tree) for part in batch.parts) + len(batch.ready)
        catch_up = partial(self._runner.catch_up, batch.budget)
        for pool, group in groups.items():
            others = other_tokens - len(group)
            decision = pool.draft(group, batch.max_nodes, others, catch_up)
            batch.groups.append(PoolTrees(pool, group, decision))

    def _commit(
        self, batch: BatchPass, logits: dict[str, Logits], seconds: float
    ) -> list[JobEvent]:
        """Walk the trees, let drafters and the governor learn, and return the events.

        Args:
            batch: the pass.
            logits: by id of the request.
            seconds: that model and guides took.
        """
        # Those that ended while the pass was under way are not concerned.
        entries = [entry for entry in batch.entries if self._current(entry)]
        nodes = sum(len(entry.tree) for entry in entries if entry.id in logits)
        for part in batch.parts:
            if part.id in logits:
                self._commit_part(part, logits[part.id])
        for group in batch.groups:
            done = [entry for entry in group.entries if entry.id in logits]
            group.pool.commit(done, [logits[entry.id] for entry in done])
            group.pool.record(done, seconds, nodes, group.decision)
        self.stats.passes += bool(nodes)
        self.stats.nodes += nodes
        return [event for entry in entries for event in self._events(entry, logits.get(entry.id))]

    def _current(self, entry: BatchEntry) -> bool:
        """Return whether an entry's request has not ended."""
        slot = self._slots.get(entry.id)
        return slot is not None and slot.run is entry.run

    def _run(self, job_id: str) -> Session:
        return self._slots[job_id].run

    def _budget_of(self, job: Job) -> int | None:
        requested = self._budget if job.budget is None else job.budget
        return requested if isinstance(requested, int) else None

    def _free(self) -> int:
        """Return the positions of memory that running requests can have."""
        return self.memory.free([self._run(job.id) for job in self.scheduler.running])

    def _open(self, job_id: str) -> list[JobEvent]:
        slot = self._slots[job_id]
        try:
            if slot.drafter is None:
                slot.drafter = slot.run.drafter = slot.pool.take()
            try:
                sequence, slot.cached = self._cached_prefix(slot.run)
            except MemoryFullError:  # this engine copies what it forks
                sequence, slot.cached = None, 0
            slot.run.open(sequence)
            slot.weigh(self.lm.engine)
        except Exception as error:
            return self._fail(job_id, error)
        self.stats.cached_tokens += slot.cached
        opened = BatchEntry(job_id, slot.run)
        self._load_documents(opened)
        return self._fail(job_id, opened.error) if opened.error else []

    def _load_documents(self, entry: BatchEntry) -> None:
        """Put the stored documents of a request into its sequence, and report its progress."""
        run, before = entry.run, entry.run.output.cached_tokens
        if run.request.documents is not None:
            self._runner.load_documents(entry)
            fresh = run.output.cached_tokens - before
            self._slots[entry.id].cached += fresh
            self.stats.cached_tokens += fresh
        if run.sequence is not None:
            self._report(entry.id)

    def _cached_prefix(self, run: Session) -> tuple[Cached | None, int]:
        """Return a sequence that holds the longest known beginning of a text, and its length.

        A request under a KV policy, or with documents, computes all of its text: that of others
        was computed otherwise.
        """
        if run.request.own_cache:
            return None, 0
        text = run.text[:-1]
        sequence, length = self.prefix_cache.match(text)
        if self.lm.pages is None:
            return sequence, length
        cost = self.governor.cost
        return sequence, self.lm.pages.load(text, sequence, cost, lambda: self.memory.ease(1))

    def _part(self, job_id: str, size: int, pass_budget: PassBudget) -> BatchEntry:
        slot = self._slots[job_id]
        size = pass_budget.fit_part(size, slot.guiding + slot.drafting)
        return BatchEntry(job_id, slot.run, tree=slot.run.next_part(size))

    def _entry(self, job_id: str) -> BatchEntry:
        slot = self._slots[job_id]
        budget = self._budget_of(slot.job)
        return BatchEntry(job_id, slot.run, budget, said=len(slot.run.output.tokens))

    def _report(self, job_id: str) -> None:
        """Report a request's progress to the scheduler."""
        run = self._run(job_id)
        self.scheduler.ran(job_id, run.held, len(run.text), run.row_count)

    def _commit_part(self, part: BatchEntry, logits: Logits) -> None:
        try:
            part.run.commit_part(part.tree, coarse(logits) if len(logits) else None)
            if not part.run.missing and not part.run.output.tokens:
                part.run.read_prompt()
        except Exception as error:  # a drafter that learns from prompts failed
            part.error = error
            return
        self.stats.prompt_tokens += len(part.tree)
        self._load_documents(part)
        if part.run.sequence is not None and not part.run.missing:
            self._keep(part.run)
            self._store(part.run)

    def _keep(self, run: Session) -> None:
        """Put the computed part of a text into the prefix cache.

        What was computed under a KV policy, or with documents, is nobody else's prefix, and what
        was decoded under an attention pattern is none of a prompt.
        """
        if run.sequence and not run.request.own_cache:
            known = self.lm.engine.prompt_positions(run.sequence)
            self.prefix_cache.insert(run.text[:known], run.sequence)

    def _store(self, run: Session) -> None:
        """Write a text that was just computed to the prefix cache on disk, if there is one."""
        if self.lm.pages is not None and run.sequence and not run.request.own_cache:
            self.lm.pages.save(run.text, run.sequence)

    def _events(self, entry: BatchEntry, logits: Logits | None) -> list[JobEvent]:
        """Return the events of a request after a pass."""
        if entry.error:
            return self._fail(entry.id, entry.error)
        if entry.walked is None or logits is None:
            return []
        run = entry.run
        event = entry.event(logits, self._slots[entry.id].job.logprobs)
        self.stats.count(event)
        if not run.done:
            self._report(entry.id)
            return [event]
        return [event, *self._end(entry.id, run.output.finish)]

    def _fail(self, job_id: str, error: Exception) -> list[JobEvent]:
        """End one request with an error, its own or a bug in what works for it."""
        if isinstance(error, PacelineError):
            return self._end(job_id, "error", str(error))
        _log.error("request %s failed", job_id, exc_info=error)
        self._slots[job_id].drafter = None  # it may be at fault
        return self._end(job_id, "error", FAILED_ALONE)

    def _end(self, job_id: str, finish: str, error: str = "") -> list[JobEvent]:
        slot = self._slots.pop(job_id, None)
        if slot is None:
            return []
        if self._apart is not None:
            self._apart.drop(job_id)
        self.scheduler.finished(job_id)
        self.stats.freed_pages += slot.run.freed_pages
        if finish != "error":
            self._keep(slot.run)
        try:
            slot.run.close()
        except Exception:
            _log.exception("request %s could not be closed", job_id)
        if slot.drafter is not None:
            slot.pool.give(slot.drafter)
        for other in self._slots.values():
            other.parked = False
        output = slot.run.output
        output.finish = finish
        return [JobEvent(job_id, finish=finish, output=output, cached=slot.cached, error=error)]
