"""Runs the passes of many requests on one engine, as the scheduler plans them.

All trees and parts of prompts of a pass are one batch. What a request gets does not depend on the
others: its tokens are drawn from its own rows by its own noise, and the engine's rows do not depend
on the batch. One thread drives a worker; `serving/service.py` has it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from time import monotonic, perf_counter

import numpy as np

from paceline.core import Floats
from paceline.decoding.governor import Fixed, Governor
from paceline.decoding.loop import follows_rejection
from paceline.decoding.run import Run
from paceline.decoding.text import TextStream
from paceline.drafters.base import Drafter, DraftMethod
from paceline.engines.base import PAGE, Memory
from paceline.errors import MemoryFullError, PacelineError, RequestError
from paceline.lm import LM
from paceline.measuring.costfile import known_cost
from paceline.models.detokenize import Detokenizer
from paceline.registry import drafters
from paceline.serving.asks import Ask, Event, Stats, logprobs
from paceline.serving.lanes import Lanes, Turn
from paceline.serving.prefix import PrefixCache
from paceline.serving.scheduler import Job, Scheduler
from paceline.serving.searching import Searches

_CHUNK = 256  # tokens of prompts in a pass that nobody waits for
_LEAST = 8  # and in one that somebody waits for
_FEWEST = 4  # pages of keys and values
_LITTLE = 0.1  # of the time, for searches
_METHODS = 8  # of drafters besides the model's own that are kept while nobody uses them

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Place:
    """A request that was handed in; from its first pass to its end it has a drafter of its own."""

    ask: Ask
    run: Run
    lanes: Lanes
    drafter: Drafter | None = None
    cached: int = 0  # tokens known from before when it got its place


class Worker:
    """See the module's text.

    Args:
        lm: the model, its drafter's method, and the budget of requests that name none.
        places: most requests that run at once.
        queue: most requests that wait.
        stall: a pass that carries parts of prompts may take so many times as long as without.
        memory: most bytes of keys and values; None takes a context for each place.
        prefixes: share of the memory that texts of the past may fill, for requests that begin
            alike; running requests can have it back.

    Raises:
        PacelineError: as `Lanes` and `known_cost`; or the memory cannot hold one request.
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
        self.lm, self.stall, self.stats = lm, stall, Stats()
        page, context = lm.engine.memory.page_bytes, lm.engine.config.context
        pages = places * Memory.pages(context) + 2 if memory is None else memory // page
        if pages < _FEWEST:
            raise RequestError(
                f"{memory} bytes of memory hold {pages} pages of keys and values, expected "
                f"{_FEWEST} at least: {_FEWEST * page} bytes"
            )
        lm.engine.kv_limit = pages * page
        self.prefixes = PrefixCache(lm.engine, int(prefixes * pages))
        # Besides, each has a page that is not full, shared until it is written to.
        self.scheduler = Scheduler(places, max(pages - 2, 1) * PAGE, queue, loss=PAGE)
        self._budget = lm.budget.nodes if isinstance(lm.budget, Fixed) else None
        self._cost = known_cost(lm.engine)
        self._own = Lanes(lm.method, lm.target, self._cost, lm.drafter)
        self._lanes: dict[DraftMethod, Lanes] = {}
        self._places: dict[str, _Place] = {}
        share = max(stall - 1, _LITTLE)
        half = self.scheduler.capacity // PAGE // 2
        self.searches = Searches(lm, queue, half, self._yields, self.stats, share)

    @property
    def governor(self) -> Governor:
        """Sizes the trees of requests that name no drafter."""
        return self._own.governor

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.scheduler.jobs and self.searches.idle

    def submit(self, ask: Ask) -> None:
        """Hand a request in.

        Raises:
            PacelineError: it cannot be run, or the queue is full.
        """
        if ask.strategy is not None:
            self.searches.submit(ask)
            return
        # Without a budget nothing is guessed, and nothing learnt from the prompt.
        lanes = self._lanes_of("plain" if self._budget_of(ask) == 0 else ask.drafter)
        first = lanes.first
        if ask.request.prediction and not first.uses_prediction:
            raise RequestError(f"the drafter {ask.drafter} has no use for a prediction")
        stream = TextStream(Detokenizer(self.lm.tokenizer), ask.request.stop_strings)
        budget = self._budget_of(ask)
        sized = lanes.governor if budget is None else Fixed(budget)
        rejects = follows_rejection(ask.request, first, sized)
        run = Run(self.lm.engine, first, ask.request, stream, rejects=rejects)
        self.scheduler.submit(
            Job(
                ask.id,
                text=len(ask.request.prompt),
                most=len(ask.request.prompt) + run.room + 1,
                client=ask.client,
                priority=ask.priority,
                deadline=ask.deadline,
                arrived=monotonic(),
                after=ask.after,
            )
        )
        self._places[ask.id] = _Place(ask, run, lanes)

    def cancel(self, ask_id: str) -> list[Event]:
        """Give a request up; nothing comes of it where it is over already."""
        return self._end(ask_id, "cancelled") or self.searches.cancel(ask_id)

    def step(self) -> list[Event]:
        """One pass; what came of it, and who is over."""
        events = []
        if not self.searches.idle:
            events = self.searches.step(self._free() // PAGE, not self.scheduler.jobs)
        begun = perf_counter()
        running = self.scheduler.running
        roots = sum(not job.missing for job in running)
        free = self._free()
        # Those that run go on meanwhile, but none is admitted beside them.
        left = max(free - self.searches.reserved * PAGE, min(free, 2 * PAGE * len(running)))
        plan = self.scheduler.plan(monotonic(), left, self._carried(roots))
        events += [event for each in plan.expired for event in self._end(each, "deadline")]
        for each in plan.preempted:
            self._preempt(each)
        events += [event for each in plan.admitted for event in self._open(each)]
        parts = [
            self._part(each, size)
            for each, size in plan.parts
            if each in self._places and self._run(each).missing
        ]
        turns = [self._turn(each) for each in plan.decoding]
        self._make_room(parts, turns, plan.nodes)
        start = perf_counter()
        groups = self._groups(turns)
        riding = sum(len(part.tree) for part in parts) + len(turns)
        for lanes, group in groups:
            lanes.draft(group, plan.nodes, riding - len(group))
        drafted = perf_counter()
        self._look(turns)
        looked = perf_counter()
        logits = self._forward([*parts, *turns])
        passed = perf_counter()
        nodes = sum(len(turn.tree) for turn in [*parts, *turns] if turn.id in logits)
        for part in parts:
            if part.id in logits:
                self._ran(part, logits[part.id])
        for lanes, group in groups:
            done = [turn for turn in group if turn.id in logits]
            lanes.take_in(done, [logits[turn.id] for turn in done])
            lanes.settle(done, passed - drafted, nodes)
        for turn in [*parts, *turns]:
            events += self._told(turn, logits.get(turn.id))
        self.stats.passes += bool(nodes)
        self.stats.nodes += nodes
        self.stats.draft += drafted - start
        self.stats.guide += looked - drafted
        self.stats.forward += passed - looked
        self.stats.walk += perf_counter() - passed
        self.searches.worked(perf_counter() - begun)
        return events

    def close(self, finish: str = "cancelled", error: str = "") -> list[Event]:
        """Give everything up, texts of the past too."""
        events = [event for each in list(self._places) for event in self._end(each, finish, error)]
        events += self.searches.close(finish, error)
        self.prefixes.clear()
        return events

    def _run(self, ask_id: str) -> Run:
        return self._places[ask_id].run

    def _lanes_of(self, drafter: str | None) -> Lanes:
        method = self.lm.method if drafter is None else drafters.parse(drafter)
        if method == self.lm.method:
            return self._own
        if method not in self._lanes:
            lanes = Lanes(method, self.lm.target, self._cost)
            used = [place.lanes for place in self._places.values()]
            unused = [known for known, each in self._lanes.items() if each not in used]
            for known in unused[: max(len(self._lanes) + 1 - _METHODS, 0)]:
                del self._lanes[known]
            self._lanes[method] = lanes
        return self._lanes[method]

    def _budget_of(self, ask: Ask) -> int | None:
        wished = self._budget if ask.budget is None else ask.budget
        return wished if isinstance(wished, int) else None

    def _groups(self, turns: list[Turn]) -> list[tuple[Lanes, list[Turn]]]:
        """The turns by where their drafters are from."""
        groups: dict[Lanes, list[Turn]] = {}
        for turn in turns:
            groups.setdefault(self._places[turn.id].lanes, []).append(turn)
        return list(groups.items())

    def _free(self) -> int:
        """Positions of memory that can be had, texts of the past given up if need be."""
        engine, running = self.lm.engine, self.scheduler.running
        runs = (self._run(job.id) for job in running)
        sequences = (run.sequence for run in runs if run.sequence is not None)
        held, copied = set[int](), 0
        for sequence in sequences:
            own = engine.pages(sequence)
            held.update(own)
            # A page that is not full and shared is copied before it is written to.
            copied += sequence.length % PAGE > 0 and self.prefixes.holds(own[-1])
        pages = (engine.memory.free or 0) + self.prefixes.idle(held) - copied
        return (max(pages, 2) if len(running) < 2 else pages) * PAGE  # one alone always fits

    def _make_room(self, parts: list[Turn], turns: list[Turn], nodes: int) -> None:
        """Give up texts of the past, so that drafters and guides find room, too."""
        lengths = [(part.run, len(part.tree)) for part in parts] + [(t.run, nodes) for t in turns]
        needed = 0
        for run, more in lengths:
            length = run.sequence.length if run.sequence else 0
            copied = length % PAGE > 0  # the last page may be shared
            needed += Memory.pages(length + more) - Memory.pages(length) + copied
        while True:
            lack = needed - (self.lm.engine.memory.free or 0)
            if lack <= 0 or not self.prefixes.shrink(lack):
                return

    def _carried(self, roots: int) -> int:
        """Tokens of prompts that a pass with so many roots may carry."""
        if not roots:
            return _CHUNK
        governor, sizes = self._own.governor, np.arange(1, _CHUNK + 1)
        slow = governor.seconds(roots + sizes) > self.stall * governor.seconds(roots)
        return max(int(slow.argmax()), _LEAST) if slow.any() else _CHUNK

    def _open(self, ask_id: str) -> list[Event]:
        place = self._places[ask_id]
        try:
            if place.drafter is None:
                place.drafter = place.run.drafter = place.lanes.take()
            try:
                sequence, place.cached = self.prefixes.match(place.run.text[:-1])
            except MemoryFullError:  # an engine that copies what it forks
                sequence, place.cached = None, 0
            place.run.open(sequence)
        except Exception as error:
            return self._fail(ask_id, error)
        self.stats.cached_tokens += place.cached
        self._tell(ask_id)
        return []

    def _part(self, ask_id: str, size: int) -> Turn:
        run = self._run(ask_id)
        return Turn(ask_id, run, tree=run.part(size))

    def _turn(self, ask_id: str) -> Turn:
        place = self._places[ask_id]
        budget = self._budget_of(place.ask)
        return Turn(ask_id, place.run, budget, said=len(place.run.output.tokens))

    def _tell(self, ask_id: str) -> None:
        """Let the scheduler know where a request stands."""
        run = self._run(ask_id)
        self.scheduler.ran(ask_id, run.sequence.length if run.sequence else 0, len(run.text))

    def _look(self, turns: list[Turn]) -> None:
        """Let the guides of each request run its tree."""
        for turn in turns:
            looked = False
            while turn.run.sequence and not turn.error and not looked:
                try:
                    turn.run.look(turn.tree)
                    looked = True
                except MemoryFullError as error:
                    self._relieve(turn, error)
                except Exception as error:
                    turn.error = error

    def _forward(self, turns: list[Turn]) -> dict[str, Floats]:
        """The logits of each turn; of those that had to give their memory up, none."""
        while turns := [turn for turn in turns if turn.run.sequence and not turn.error]:
            rows = [turn.run.watches if turn.run.missing else True for turn in turns]
            batch = [(turn.run.sequence, turn.tree) for turn in turns if turn.run.sequence]
            try:
                logits = self.lm.engine.forward(batch, rows)
            except MemoryFullError as error:
                self._relieve(turns[0], error)
            except PacelineError as error:
                self._blame(turns, error)
            else:
                sizes = [len(t.tree) * shown for t, shown in zip(turns, rows, strict=True)]
                split = np.split(logits, np.cumsum(sizes)[:-1])
                return {turn.id: part for turn, part in zip(turns, split, strict=True)}
        return {}

    def _relieve(self, turn: Turn, error: MemoryFullError) -> None:
        """Let a turn have more memory: of texts of the past, or of the least important request."""
        running = self.scheduler.running
        if self.prefixes.shrink(len(running)):
            return
        if len(running) > 1:
            self._preempt(running[-1].id)
        elif not self.searches.give_way():
            turn.error = error

    def _yields(self) -> bool:
        """Give a text of the past up for a search; or those that run may yet end."""
        return self.prefixes.shrink(1) > 0 or bool(self.scheduler.running)

    def _blame(self, turns: list[Turn], error: PacelineError) -> None:
        """Find out whose tree a pass was refused for: the others are run without it."""
        for turn in turns:
            assert turn.run.sequence is not None
            try:
                self.lm.engine.forward([(turn.run.sequence, turn.tree)], "none")
            except Exception as own:
                turn.error = own
        if not any(turn.error for turn in turns):
            for turn in turns:
                turn.error = error

    def _ran(self, part: Turn, logits: Floats) -> None:
        try:
            part.run.ran(part.tree, logits if len(logits) else None)
        except Exception as error:  # of a drafter that learns from prompts
            part.error = error
            return
        self.stats.prompt_tokens += len(part.tree)
        self._tell(part.id)
        if not part.run.missing:
            self._keep(part.run)

    def _keep(self, run: Run) -> None:
        """Let later requests begin with what this one has run."""
        if run.sequence:
            self.prefixes.insert(run.text[: run.sequence.length], run.sequence)

    def _told(self, turn: Turn, logits: Floats | None) -> list[Event]:
        """What a request is told after a pass."""
        if turn.error:
            return self._fail(turn.id, turn.error)
        if turn.walked is None or logits is None:
            return []
        run, path = turn.run, turn.walked.path
        tokens = run.output.tokens[turn.said :]
        names = [run.drafter.origins[turn.tree.origin[node]] for node in path[1:]]
        for origin in turn.tree.origin[1:]:
            name = run.drafter.origins[origin]
            self.stats.guessed[name] = self.stats.guessed.get(name, 0) + 1
        for name in names[: len(tokens)]:
            self.stats.accepted[name] = self.stats.accepted.get(name, 0) + 1
        self.stats.tokens += len(tokens)
        wanted = self._places[turn.id].ask.logprobs
        event = Event(
            turn.id,
            "".join(turn.texts),
            tokens,
            [*names, None][: len(tokens)],
            [] if wanted is None else logprobs(logits[path[: len(tokens)]], tokens, wanted),
            turn.tree,
            path,
            turn.texts,
            run.drafter.origins,
            monotonic(),
            passes=1,
        )
        if not run.done:
            self._tell(turn.id)
            return [event]
        return [event, *self._end(turn.id, run.output.finish)]

    def _preempt(self, ask_id: str) -> None:
        self._run(ask_id).close()
        if self.scheduler.jobs[ask_id].stage != "waiting":
            self.scheduler.preempt(ask_id)
        self.stats.preempted += 1

    def _fail(self, ask_id: str, error: Exception) -> list[Event]:
        """End a request alone: by its own fault, or by a bug in what works for it."""
        if isinstance(error, PacelineError):
            return self._end(ask_id, "error", str(error))
        _log.error("request %s failed", ask_id, exc_info=error)
        self._places[ask_id].drafter = None  # it may be the one that is broken
        return self._end(ask_id, "error", "the server failed at this request; its log says more")

    def _end(self, ask_id: str, finish: str, error: str = "") -> list[Event]:
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
        output = place.run.output
        output.finish = finish
        return [Event(ask_id, finish=finish, output=output, cached=place.cached, error=error)]
