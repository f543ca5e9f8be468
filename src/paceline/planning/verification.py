"""Runs the best setups end to end in turns, and says how fast each is with an interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from statistics import median
from time import monotonic, perf_counter
from typing import NamedTuple, Protocol

from paceline.core import Request
from paceline.engines.cost_cache import cost_of
from paceline.errors import PacelineError
from paceline.lm import LM
from paceline.measuring.statistics import Ratio, total_ratio
from paceline.planning.busy_watch import BusyWatch
from paceline.planning.plan_search import Candidate
from paceline.planning.settled_head import settle_head
from paceline.planning.setups import Setup


class TurnTime(NamedTuple):
    """What one turn took.

    Attributes:
        tokens: that were decoded.
        seconds: of decoding; with several users of their prompts, too.
        first_token: seconds until the first token of one prompt alone.
    """

    tokens: int
    seconds: float
    first_token: float


class SetupRunner(Protocol):
    """Runs one setup; tests have one without a model."""

    turns: int

    def begin_round(self) -> None:
        """Forget what was learnt."""
        ...

    def run(self, turn: int) -> TurnTime:
        """Run one turn."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


class ModelRunner:
    """Runs the prompts of a plan with a setup.

    Args:
        setup: the setup.
        requests: makes the requests for an opened model.
        users: that run at once: then a turn is a whole batch.
    """

    def __init__(
        self, setup: Setup, requests: Callable[[LM], list[Request]], users: int = 1
    ) -> None:
        self._lm = LM(setup.model, engine="native", **setup.options())
        self._requests = requests(self._lm)
        self._users = users
        self.turns = len(self._requests) if users == 1 else 1
        self._lm.stream(self._requests[0]).run()  # warm-up, not counted
        settle_head(self._lm.engine)
        if users > 1:
            cost_of(self._lm.engine)  # a batch measures T(n) first, which is not counted either

    def begin_round(self) -> None:
        """Forget what was learnt."""
        self._lm.reset()

    def run(self, turn: int) -> TurnTime:
        """Run one prompt, or one batch of as many prompts as there are users."""
        output = self._lm.stream(self._requests[turn]).run()
        first = output.seconds.prefill + output.seconds.decode / max(output.passes, 1)
        if self._users == 1:
            return TurnTime(len(output.tokens), output.seconds.decode, first)
        from paceline.serving.offline import run_batch

        self._lm.reset()
        batch = [self._requests[each % len(self._requests)] for each in range(self._users)]
        start = perf_counter()
        outputs = run_batch(self._lm, batch)
        seconds = perf_counter() - start
        return TurnTime(sum(len(each.tokens) for each in outputs), seconds, first)

    def close(self) -> None:
        """Free the model."""
        self._lm.close()


@dataclass(frozen=True)
class Verified:
    """A setup and what it did end to end.

    Attributes:
        candidate: the setup with its forecast.
        speed: tokens a second of all users, with a 95 % interval.
        first_token: seconds, median.
        rounds: that were run.
    """

    candidate: Candidate
    speed: Ratio
    first_token: float
    rounds: int

    @property
    def error(self) -> float:
        """Return by how much the forecast was off: 0.1 is 10 % too fast."""
        return self.candidate.forecast.tokens_per_second / self.speed.value - 1


@dataclass
class Verification:
    """Interleaves setups: in every round each runs every turn, in rotating order.

    Attributes:
        open: opens a setup.
        watch: has a round repeated that a busy machine slowed down.
        deadline: of `clock`; at least one round is run.
        rounds: to run.
        clock: seconds.
        alone: holds the lock of measurements on this machine, during each round.
        failed: why a setup could not be run, by its title.
    """

    open: Callable[[Setup], SetupRunner]
    watch: BusyWatch
    deadline: float
    rounds: int = 3
    clock: Callable[[], float] = monotonic
    alone: Callable[[], AbstractContextManager[None]] = nullcontext
    failed: dict[str, str] = field(default_factory=dict)
    _times: list[dict[tuple[int, int], TurnTime]] = field(default_factory=list)

    def run(self, candidates: Sequence[Candidate]) -> list[Verified]:
        """Return what each candidate did, in their order, without those that cannot be run.

        Raises:
            PacelineError: none can.
        """
        self._times.clear()
        with ExitStack() as stack:
            runners: list[SetupRunner] = []
            opened: list[Candidate] = []
            for each in candidates:
                try:
                    runners.append(runner := self.open(each.setup))
                except PacelineError as error:
                    self.failed[each.setup.title] = str(error)
                    if not opened and each is candidates[-1]:
                        raise
                    continue
                opened.append(each)
                stack.callback(runner.close)
            for number in range(self.rounds):
                if number and self.clock() >= self.deadline:
                    break
                with self.alone():
                    times = self.watch.run(
                        "the best setups",
                        lambda number=number: self._round(runners, number),  # type: ignore[misc]
                        _faster,
                    )
                self._times.append(times)
        return [self._summary(arm, each) for arm, each in enumerate(opened)]

    def _round(
        self, runners: Sequence[SetupRunner], number: int
    ) -> dict[tuple[int, int], TurnTime]:
        """Return the times of a round, by number of the arm and of the turn."""
        times = {}
        for runner in runners:
            runner.begin_round()
        for turn in range(runners[0].turns):
            first = (turn + number) % len(runners)
            for arm in [*range(first, len(runners)), *range(first)]:
                times[arm, turn] = runners[arm].run(turn)
        return times

    def _summary(self, arm: int, candidate: Candidate) -> Verified:
        turns = sorted({turn for own, turn in self._times[0] if own == arm})
        if len(turns) > 1:  # prompts are the independent units
            tokens = [float(self._times[0][arm, turn].tokens) for turn in turns]
            seconds = [median(times[arm, turn].seconds for times in self._times) for turn in turns]
        else:
            tokens = [float(times[arm, turn].tokens) for times in self._times for turn in turns]
            seconds = [times[arm, turn].seconds for times in self._times for turn in turns]
        first = median(times[arm, turn].first_token for times in self._times for turn in turns)
        return Verified(candidate, total_ratio(tokens, seconds), first, len(self._times))


def _faster(
    a: dict[tuple[int, int], TurnTime], b: dict[tuple[int, int], TurnTime]
) -> dict[tuple[int, int], TurnTime]:
    """Return the round that took less time as a whole."""
    total = [sum(each.seconds for each in times.values()) for times in (a, b)]
    return a if total[0] <= total[1] else b
