"""Answers what the planner asks: from what is kept, or by a measurement while there is time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, NamedTuple, TypeVar

from paceline.errors import MemoryFullError, PacelineError
from paceline.measuring.significance import mean_estimate
from paceline.planning.busy_watch import BusyWatch
from paceline.planning.measured_facts import MAX_NODES, DraftFacts, EngineFacts, ReadFacts
from paceline.planning.measurement_store import MeasurementStore
from paceline.planning.measurements import Measuring
from paceline.planning.setups import ALL_ROWS, CacheForm

T = TypeVar("T")


class PairedLoss(NamedTuple):
    """What a setup loses against the model as it is stored.

    Attributes:
        value: nats a token, or score; above 0 is worse.
        error: standard error over the windows, or the prompts; None for a single one.
    """

    value: float
    error: float | None


NO_LOSS = PairedLoss(0.0, 0.0)


@dataclass
class Lab:
    """Measurements with a deadline; each is kept, and made again where the machine was busy.

    Attributes:
        model: path of the model that is planned for.
        store: keeps them.
        measurer: makes them.
        watch: notices a busy machine.
        deadline: of `clock`, after which nothing is measured.
        question: what prompts, text and judge are, for keys.
        judged: losses are scores of the judge.
        clock: seconds.
        say: is given a line for the user.
        failed: why a candidate cannot be measured, by its name.
        unmeasured: what there was no time for.
        made: number of measurements that were made.
    """

    model: str
    store: MeasurementStore
    measurer: Measuring
    watch: BusyWatch
    deadline: float
    question: Sequence[object] = ()
    judged: bool = False
    clock: Callable[[], float] = monotonic
    say: Callable[[str], None] = lambda line: None
    failed: dict[str, str] = field(default_factory=dict)
    unmeasured: list[str] = field(default_factory=list)
    made: int = 0
    _fingerprints: dict[str, str] = field(default_factory=dict)

    def engine(
        self,
        path: str,
        weight_format: str,
        threads: int | None = None,
        weights_memory: int | None = None,
    ) -> EngineFacts | None:
        """Return what a checkpoint in a format takes; None if it cannot be measured."""
        name = f"{self._name(path)}{weight_format}" + (f" on {threads} threads" if threads else "")
        if weights_memory is not None:
            name += f" with {weights_memory / 1e6:.0f} MB of weights in memory"
        return self._ask(
            "engine",
            (self._fingerprint(path), weight_format, threads, weights_memory),
            name,
            EngineFacts.parse,
            lambda: self.measurer.engine(path, weight_format, threads, weights_memory),
            lambda a, b: a if a["seconds"][0] <= b["seconds"][0] else b,
        )

    def streamed_pass(self, weights_memory: int) -> float:
        """Return the seconds of a plain pass now whose weights stream; 0 where there is no time."""
        if not self.has_time:
            return 0.0
        try:
            return self.measurer.streamed_pass(weights_memory)
        except PacelineError:
            return 0.0

    def drafts(self, drafter: str, nodes: int = MAX_NODES) -> DraftFacts | None:
        """Return what a drafter gains on the prompts; None if it cannot be measured.

        Args:
            drafter: `NAME[:key=value,...]`.
            nodes: largest budget.
        """
        deep = () if nodes == MAX_NODES else (nodes,)
        warm = self.measurer.warm_start()
        return self._ask(
            "drafts",
            (drafter, *deep, *((warm,) if warm else ()), *self.question),
            f"{drafter} with {nodes} nodes" if deep else drafter,
            DraftFacts.parse,
            lambda: self.measurer.drafts(drafter, nodes),
            lambda a, b: a if a["seconds"] <= b["seconds"] else b,
        )

    def reads(self, attention: str, cached: int) -> ReadFacts | None:
        """Return what an attention pattern reads; None if it cannot be measured.

        Args:
            attention: `NAME[:key=value,...]`.
            cached: positions before the pass.
        """
        return self._ask(
            "reads",
            (self._fingerprint(self.model), attention, cached),
            f"attention {attention}",
            ReadFacts.parse,
            lambda: self.measurer.reads(attention, cached),
            lambda a, b: a if a["share"] <= b["share"] else b,
        )

    def bandwidth(self, make: Callable[[], float] | None = None) -> float:
        """Return the memory bandwidth, which is always measured: it takes a moment.

        Args:
            make: measures it; None takes the measurer.
        """
        return self.store.measured("bandwidth", (), _positive, make or self.measurer.bandwidth)

    def loss(
        self,
        path: str,
        weight_format: str,
        cache: CacheForm = ALL_ROWS,
        window: int = 0,
    ) -> PairedLoss | None:
        """Return what a setup loses; None if it cannot be measured.

        Args:
            path: of the checkpoint.
            weight_format: of its weights.
            cache: how keys and values are kept and read.
            window: tokens of a window of the text; 0 takes a usual size.
        """
        stored = (self.model, "auto", ALL_ROWS)
        if (path, weight_format, cache) == stored:
            return NO_LOSS
        base = self._values(*stored, window)
        ours = self._values(path, weight_format, cache, window)
        return self._paired(ours, base)

    def known_loss(
        self,
        path: str,
        weight_format: str,
        cache: CacheForm = ALL_ROWS,
        window: int = 0,
    ) -> PairedLoss | None:
        """Return what `loss` measured before; None if it did not."""
        stored = (self.model, "auto", ALL_ROWS)
        if (path, weight_format, cache) == stored:
            return NO_LOSS
        kind = "scores" if self.judged else "nats"
        base, ours = (
            self.store.known(kind, self._values_key(form, window), _numbers)
            for form in (stored, (path, weight_format, cache))
        )
        return self._paired(ours, base)

    def _paired(self, ours: list[float] | None, base: list[float] | None) -> PairedLoss | None:
        if base is None or ours is None or len(base) != len(ours):
            return None
        sign = -1 if self.judged else 1
        return PairedLoss(*mean_estimate([sign * (a - b) for a, b in zip(ours, base, strict=True)]))

    def reference(self) -> float:
        """Return the seconds of a plain pass of the planned model now; 0 where there is no time."""
        if not self.has_time and not self.made:
            return 0.0
        try:
            return self.measurer.reference()
        except PacelineError:
            return 0.0

    @property
    def has_time(self) -> bool:
        """Return whether something may still be measured."""
        return self.clock() < self.deadline

    def _values(
        self, path: str, weight_format: str, cache: CacheForm, window: int
    ) -> list[float] | None:
        form = (path, weight_format, cache)
        name = ", ".join([weight_format, *cache.words])
        measure = self.measurer.scores if self.judged else self.measurer.nats
        rest = () if self.judged else (window,)
        return self._ask(
            "scores" if self.judged else "nats",
            self._values_key(form, window),
            f"the loss of {self._name(path)}{name}",
            _numbers,
            lambda: measure(*form, *rest),
            lambda a, b: a,
            timed=False,
        )

    def _values_key(self, form: tuple[str, str, CacheForm], window: int) -> tuple[object, ...]:
        path, weight_format, cache = form
        return (self._fingerprint(path), weight_format, *cache, window, *self.question)

    def _ask(
        self,
        kind: str,
        key: Sequence[object],
        name: str,
        parse: Callable[[Any], T],
        make: Callable[[], Any],
        better: Callable[[Any, Any], Any],
        timed: bool = True,
    ) -> T | None:
        if name in self.failed:
            return None
        known = self.store.known(kind, key, parse)
        if known is not None:
            return known
        refused = self.store.known("refused", (kind, *key), str)
        if refused is not None:
            self.failed[name] = refused
            return None
        if not self.has_time:
            if name not in self.unmeasured:
                self.unmeasured.append(name)
            return None

        def timed_make() -> Any:
            before, found = self.measurer.reference(), make()
            return {**found, "reference": min(before, self.measurer.reference())}

        def watched() -> Any:
            self.made += 1
            return self.watch.run(name, timed_make, better) if timed else make()

        self.say(f"measuring {name}")
        try:
            return self.store.measured(kind, key, parse, watched)
        except MemoryFullError as error:  # there may be more another time
            self.failed[name] = str(error)
        except PacelineError as error:
            reason = self.failed[name] = str(error)
            self.store.measured("refused", (kind, *key), str, lambda: reason)
        return None

    def _fingerprint(self, path: str) -> str:
        if path not in self._fingerprints:
            self._fingerprints[path] = self.measurer.fingerprint(path)
        return self._fingerprints[path]

    def _name(self, path: str) -> str:
        return "" if path == self.model else f"{path} "


def _numbers(found: Any) -> list[float]:
    values = [float(each) for each in found]
    if not values or not all(abs(each) < 1e6 for each in values):
        raise ValueError("no numbers")
    return values


def _positive(found: Any) -> float:
    value = float(found)
    if not 0 < value < 1e15:
        raise ValueError("no bandwidth")
    return value
