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
        places: most requests that run at once.
        queue: most requests that wait.
        stall: a pass that carries parts of prompts may take so many times as long as without.
        memory: most bytes of keys and values, of drafters and guides, too; None takes a context of
            the model for each place, and as many for these as they want.
        prefixes: share of the memory that texts of the past may fill, for requests that begin
            alike; running requests can have it back.

    Raises:
        PacelineError: as `DrafterPool` and `known_cost`; or the memory cannot hold one request.
    """

    def __init__(
        self,
        lm: LM,
        places: int = 32,
        queue: int = 1024,
        stall: float = 2.0,
        memory: int | None = None,
        prefixes: float = 0.5,
    ) -> None:
        self.lm, self.stall, self.stats = lm, stall, WorkerStats()
        self.scheduler = Scheduler(places, queue=queue, loss=PAGE)
        self.memory = KVBudget(lm.engine, self.scheduler, memory, prefixes)
        self.memory.know(lm.guide_models.loaded, loaded=True)
        self._fleet = DrafterPools(lm, known_cost(lm.engine), self.memory)
        self._budget = lm.budget.nodes if isinstance(lm.budget, Fixed) else None
        self._places: dict[str, Slot] = {}
        self._runner = PassRunner(lm.engine, self.scheduler, self.memory, self._places, self.stats)
        share = max(stall - 1, _LITTLE)
        half = self.scheduler.capacity // PAGE // 2
        self.searches = SearchQueue(lm, queue, half, self._runner.yields, self.stats, share)
        self._runner.give_way = self.searches.give_way

    @property
    def prefixes(self) -> PrefixCache:
        """Texts of the past."""
        return self.memory.prefixes

    @property
    def governor(self) -> Governor:
        """Sizes the trees of requests that name no drafter."""
        return self._fleet.own.governor

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.scheduler.jobs and self.searches.idle

    def submit(self, ask: Job) -> None:
        """Hand a request in.

        Raises:
            PacelineError: it cannot be run, or the queue is full.
        """
        if ask.strategy is not None:
            self.searches.submit(ask)
            return
        # Without a budget nothing is guessed, and nothing learnt from the prompt.
        used = [place.lanes for place in self._places.values()]
        lanes = self._fleet.of("plain" if self._budget_of(ask) == 0 else ask.drafter, used)
        first = lanes.first
        if ask.request.prediction and not first.uses_prediction and self._budget_of(ask) != 0:
            raise RequestError(f"the drafter {ask.drafter} has no use for a prediction")
        stream = text_of(ask.request, self.lm.tokenizer)
        budget = self._budget_of(ask)
        sized = lanes.governor if budget is None else Fixed(budget)
        rejects = follows_rejection(ask.request, first, sized)
        run = Session(self.lm.engine, first, ask.request, stream, rejects=rejects)
        for guide in run.guides:
            self.memory.know(engine for engine, _ in guide.positions(len(ask.request.prompt)))
        self.scheduler.submit(
            ScheduledJob(
                ask.id,
                text=len(ask.request.prompt),
                most=self.memory.most(run),
                cost=self.memory.cost(run),
                client=ask.client,
                priority=ask.priority,
                deadline=ask.deadline,
                arrived=monotonic(),
                after=ask.after,
            )
        )
        self._places[ask.id] = Slot(ask, run, lanes)

    def cancel(self, ask_id: str) -> list[JobEvent]:
        """Give a request up; nothing comes of it where it is over already."""
        return self._end(ask_id, "cancelled") or self.searches.cancel(ask_id)

    def step(self) -> list[JobEvent]:
        """One pass; what came of it, and who is over."""
        events = []
        if not self.searches.idle:
            events = self.searches.step(self._free() // PAGE, not self.scheduler.jobs)
        begun = perf_counter()
        running = self.scheduler.running
        streams = sum(not job.missing for job in running)
        tokens = prefill_tokens(self.governor, streams, self.stall)
        free = self._free()
        # Those that run go on meanwhile, but none is admitted beside them.
        left = max(free - self.searches.reserved * PAGE, min(free, 2 * PAGE * len(running)))
        plan = self.scheduler.plan(monotonic(), left, tokens)
        events += [event for each in plan.expired for event in self._end(each, "deadline")]
        for each in plan.preempted:
            self._runner.preempt(each)
        events += [event for each in plan.admitted for event in self._open(each)]
        reading = PassBudget(tokens, alone=not streams or len(self.scheduler.running) < 2)
        parts = [
            self._part(each, size, reading)
            for each, size in plan.parts
            if each in self._places and self._run(each).missing
        ]
        turns = [self._turn(each) for each in plan.decoding]
        every = [*parts, *turns]
        self._runner.make_room(parts, turns, plan.nodes)
        start = perf_counter()
        turns = self._runner.read(parts, turns, reading)
        groups = self._groups(turns)
        other_tokens = sum(len(part.tree) for part in parts) + len(turns)
        follow = partial(self._runner.follow, reading)
        for lanes, group in groups:
            lanes.draft(group, plan.nodes, other_tokens - len(group), follow)
        drafted = perf_counter()
        turns = self._runner.look(turns)
        looked = perf_counter()
        logits = self._runner.forward([*parts, *turns])
        passed = perf_counter()
        nodes = sum(len(turn.tree) for turn in every if turn.id in logits)
        for part in parts:
            if part.id in logits:
                self._ran(part, logits[part.id])
        for lanes, group in groups:
            done = [turn for turn in group if turn.id in logits]
            lanes.take_in(done, [logits[turn.id] for turn in done])
            lanes.settle(done, passed - drafted, nodes)
        for turn in every:
            events += self._told(turn, logits.get(turn.id))
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
        events = [event for each in list(self._places) for event in self._end(each, finish, error)]
        events += self.searches.close(finish, error)
        self.prefixes.clear()
        for drafter in self._fleet.idle():
            drafter.release()
        return events

    def _run(self, ask_id: str) -> Session:
        return self._places[ask_id].run

    def _budget_of(self, ask: Job) -> int | None:
        wished = self._budget if ask.budget is None else ask.budget
        return wished if isinstance(wished, int) else None

    def _groups(self, turns: list[BatchEntry]) -> list[tuple[DrafterPool, list[BatchEntry]]]:
        """The turns by where their drafters are from."""
        groups: dict[DrafterPool, list[BatchEntry]] = {}
        for turn in turns:
            groups.setdefault(self._places[turn.id].lanes, []).append(turn)
        return list(groups.items())

    def _free(self) -> int:
        """Positions of memory that can be had."""
        return self.memory.free([self._run(job.id) for job in self.scheduler.running])

    def _open(self, ask_id: str) -> list[JobEvent]:
        place = self._places[ask_id]
        try:
            if place.drafter is None:
                place.drafter = place.run.drafter = place.lanes.take()
            try:
                sequence, place.cached = self.prefixes.match(place.run.text[:-1])
            except MemoryFullError:  # an engine that copies what it forks
                sequence, place.cached = None, 0
            place.run.open(sequence)
            place.weigh(self.lm.engine)
        except Exception as error:
            return self._fail(ask_id, error)
        self.stats.cached_tokens += place.cached
        self._tell(ask_id)
        return []

    def _part(self, ask_id: str, size: int, reading: PassBudget) -> BatchEntry:
        place = self._places[ask_id]
        size = reading.part(size, place.guiding + place.drafting)
        return BatchEntry(ask_id, place.run, tree=place.run.next_part(size))

    def _turn(self, ask_id: str) -> BatchEntry:
        place = self._places[ask_id]
        budget = self._budget_of(place.ask)
        return BatchEntry(ask_id, place.run, budget, said=len(place.run.output.tokens))

    def _tell(self, ask_id: str) -> None:
        """Let the scheduler know where a request stands."""
        run = self._run(ask_id)
        self.scheduler.ran(ask_id, run.sequence.length if run.sequence else 0, len(run.text))

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
            self.prefixes.insert(run.text[: run.sequence.length], run.sequence)

    def _told(self, turn: BatchEntry, logits: Floats | None) -> list[JobEvent]:
        """What a request is told after a pass."""
        if turn.error:
            return self._fail(turn.id, turn.error)
        if turn.walked is None or logits is None:
            return []
        run = turn.run
        event = turn.event(logits, self._places[turn.id].ask.logprobs)
        self.stats.count(event)
        if not run.done:
            self._tell(turn.id)
            return [event]
        return [event, *self._end(turn.id, run.output.finish)]

    def _fail(self, ask_id: str, error: Exception) -> list[JobEvent]:
        """End a request alone: by its own fault, or by a bug in what works for it."""
        if isinstance(error, PacelineError):
            return self._end(ask_id, "error", str(error))
        _log.error("request %s failed", ask_id, exc_info=error)
        self._places[ask_id].drafter = None  # it may be the one that is broken
        return self._end(ask_id, "error", FAILED_ALONE)

    def _end(self, ask_id: str, finish: str, error: str = "") -> list[JobEvent]:
        place = self._places.pop(ask_id, None)
        if place is None:
            return []
        self.scheduler.finished(ask_id)
        if finish != "error":
            self._keep(place.run)
        try:
            place.run.close()
        except Exception:
            _log.exception("request %s did not end well", ask_id)
        if place.drafter is not None:
            place.lanes.give(place.drafter)
        for other in self._places.values():
            other.parked = False
        output = place.run.output
        output.finish = finish
        return [JobEvent(ask_id, finish=finish, output=output, cached=place.cached, error=error)]
