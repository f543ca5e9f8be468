"""Tunes a running server while it has no requests: what changes no answer, and only that."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from paceline import registry
from paceline.core import Cost, Request, TokenTree
from paceline.decoding.governor import Budget, Fixed, Governor
from paceline.decoding.loop import Generation
from paceline.drafters.base import DraftMethod
from paceline.engines.base import Cached
from paceline.engines.cost_cache import cost_of
from paceline.errors import MemoryFullError, MethodError, PacelineError
from paceline.machine import usable_cores
from paceline.planning.candidates import thread_candidates
from paceline.serving.messages import Job, JobEvent

if TYPE_CHECKING:
    from paceline.serving.worker import Worker

_DRAFTERS = ("plain", "token_recycling", "recycle", "suffix")  # beside the configured one
_PROMPTS, _PROMPT_TOKENS, _TOKENS = 4, 64, 32  # short passes: a request may arrive during one
_EVIDENCE = 2  # requests from which tuning begins
_AGAIN = 32  # requests after which it is done again
_FASTER = 1.05  # by which another setup must be faster
_SIZES, _REPEATS = (1, 8), 5  # passes by which threads are compared

_Steps = Generator[None, None, None]
_TICK = 1e-9  # seconds: no pass takes less

_log = logging.getLogger("paceline.serving.tuning")


@dataclass(frozen=True)
class TuningArm:
    """A way to draft.

    Attributes:
        method: the drafter's settings.
        budget: nodes beyond the root; None leaves them to a governor.
    """

    method: DraftMethod
    budget: int | None

    @property
    def name(self) -> str:
        """Return it as users write it."""
        return f"{self.method.name}@{'auto' if self.budget is None else self.budget}"


@dataclass
class IdleTuner:
    """Measures drafters, budgets and threads on the last requests, a pass at a time.

    Requests come first: one that arrives ends what is measured just then, which begins anew later.
    Prompts are kept in memory until others replace them, and go nowhere else.

    Attributes:
        worker: whose setup is tuned; all calls are made in its thread.
        drafter, budget, threads: whether each may be changed.
        clock: seconds.
        finished: requests since the last time that everything was measured.
        switches: what was switched, for people.
    """

    worker: Worker
    drafter: bool = True
    budget: bool = True
    threads: bool = True
    clock: Callable[[], float] = perf_counter
    finished: int = 0
    switches: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._prompts: deque[tuple[int, ...]] = deque(maxlen=_PROMPTS)
        self._running: _Steps | None = None
        self._needed = _EVIDENCE
        self._times: dict[tuple[TuningArm, int], tuple[int, float]] = {}
        self._frozen: list[tuple[int, ...]] = []
        budget = self.worker.default_budget
        self._current = TuningArm(self.worker.lm.drafter_method, budget)
        self._configured = self._current

    def on_submit(self, job: Job) -> None:
        """Give way to a request."""
        self._give_way()

    def on_event(self, job: Job, event: JobEvent) -> None:
        """Keep the end of the prompt of a request that has ended."""
        if event.finish in ("stop", "length", "context") and event.output is not None:
            self.finished += 1
            self._prompts.append(tuple(job.request.prompt[-_PROMPT_TOKENS:]))

    def step(self) -> bool:
        """Run one pass of a measurement; return whether there is more to do."""
        if self._running is None:
            if self.finished < self._needed or not self.worker.idle:
                return False
            self._frozen = self._frozen or list(self._prompts)
            self._running = self._measure()
        try:
            next(self._running)
        except StopIteration:
            self._running, self.finished, self._needed = None, 0, _AGAIN
            self._times.clear()
            self._frozen = []
            return False
        except MemoryFullError:
            self._give_way()
            return False
        return True

    def _give_way(self) -> None:
        """End a measurement; what was measured as a whole is kept."""
        if self._running is not None:
            self._running.close()  # frees its pages
            self._running = None

    def _measure(self) -> _Steps:
        if self.threads:
            yield from self._tune_threads()
        yield from self._tune_drafting()

    def _tune_threads(self) -> _Steps:
        """Compare numbers of threads on single passes; switch where others are clearly faster."""
        engine = self.worker.lm.engine
        now = engine.threads
        if now is None:
            return
        counts = [now, *thread_candidates(now, usable_cores())]
        best: dict[tuple[int, int], float] = {}
        ids = (np.arange(_PROMPT_TOKENS // 2) % engine.config.vocab_size).astype(np.int32)
        sequence = engine.start(ids[: engine.config.context // 2])
        try:
            for _ in range(_REPEATS):
                for count in counts:
                    for size in _SIZES:
                        seconds = self._pass_seconds(sequence, size, count, now)
                        known = best.get((count, size), seconds)
                        best[count, size] = min(seconds, known)
                        yield
        finally:
            engine.release(sequence)
        sums = {count: sum(best[count, size] for size in _SIZES) for count in counts}
        fastest = min(counts, key=lambda count: sums[count])
        ratios = [best[now, size] / max(best[fastest, size], _TICK) for size in _SIZES]
        if min(ratios) < _FASTER:
            return
        with suppress(MethodError, AttributeError):
            setattr(engine, "threads", fastest)  # noqa: B010 (of the native engine)
            cost = cost_of(engine)
            slower = Cost(cost.nodes, tuple(each / ratios[0] for each in cost.seconds))
            self.worker.switch(self._current.method, self._current.budget, slower)
            self._tell(f"{now} threads", f"{fastest} threads", min(ratios))

    def _pass_seconds(self, sequence: Cached, size: int, count: int, now: int) -> float:
        """Return the time of a pass with other threads, which are set for this pass alone."""
        engine = self.worker.lm.engine
        tree = TokenTree.chain(np.arange(size, dtype=np.int32) % engine.config.vocab_size)
        try:
            setattr(engine, "threads", count)  # noqa: B010 (of the native engine)
            start = self.clock()
            engine.forward([(sequence, tree)])
            return self.clock() - start
        finally:
            setattr(engine, "threads", now)  # noqa: B010

    def _arms(self) -> list[TuningArm]:
        """Return the configured way to draft, and others that may replace it."""
        own = self._configured
        arms = [own]
        if self.budget:
            arms += [TuningArm(own.method, None)]
        if self.drafter:
            budget = None if self.budget else own.budget
            methods = [registry.drafters.parse(name) for name in _DRAFTERS]
            arms += [TuningArm(method, budget) for method in methods]
        return list(dict.fromkeys(arms))

    def _tune_drafting(self) -> _Steps:
        """Decode the last prompts with each arm in turns; switch to one that is clearly faster."""
        arms = self._arms()
        if len(arms) < 2:
            return
        for number in range(len(self._frozen)):
            first = number % len(arms)
            for arm in arms[first:] + arms[:first]:
                if (arm, number) not in self._times:
                    yield from self._decode(arm, number)
        speeds = {arm: self._speed(arm) for arm in arms}
        best = max(arms, key=lambda arm: speeds[arm])
        now = speeds.get(self._current, 0.0)
        if best != self._current and speeds[best] > _FASTER * now > 0:
            self.worker.switch(best.method, best.budget)
            self._tell(self._current.name, best.name, speeds[best] / now)
            self._current = best

    def _decode(self, arm: TuningArm, number: int) -> _Steps:
        """Decode one prompt; the time of the passes is kept once it has ended."""
        lm = self.worker.lm
        prompt = self._frozen[number][-(lm.engine.config.context // 2) :]
        tokens = min(_TOKENS, lm.engine.config.context - len(prompt))
        request = Request(prompt, tokens, temperature=0.0)
        sized: Budget
        sized = Governor(cost_of(lm.engine)) if arm.budget is None else Fixed(arm.budget)
        try:
            drafter = arm.method.build(lm.draft_target)
            generation = Generation(lm.engine, drafter, request, sized)
        except PacelineError:
            self._times[arm, number] = 0, 1.0  # it cannot draft here
            return
        passes, spent = iter(generation.steps()), 0.0
        try:
            while True:
                start = self.clock()
                if next(passes, None) is None:
                    break
                spent += self.clock() - start
                yield
        finally:
            passes.close()  # type: ignore[attr-defined]  # a generator: frees its pages
        self._times[arm, number] = len(generation.output.tokens), spent

    def _speed(self, arm: TuningArm) -> float:
        """Return the tokens a second of an arm over all prompts."""
        runs = [each for (own, _), each in self._times.items() if own == arm]
        seconds = sum(spent for _, spent in runs)
        return sum(tokens for tokens, _ in runs) / seconds if seconds else 0.0

    def _tell(self, before: str, after: str, ratio: float) -> None:
        line = f"{after} instead of {before}"
        self.switches.append(line)
        _log.info("switched", extra={"fields": {"to": after, "from": before, "times": ratio}})
