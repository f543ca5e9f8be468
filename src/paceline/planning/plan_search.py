"""Searches for the setup that reaches a goal: bounds, measurements, forecasts, and a ranking."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product

from paceline.errors import RequestError
from paceline.planning.candidates import (
    STORED,
    WeightCandidate,
    attentions,
    drafter_candidates,
    goes_together,
    kv_candidates,
    out_of_bounds,
    policies,
    thread_candidates,
    weight_candidates,
)
from paceline.planning.cost_model import Forecast, forecast
from paceline.planning.known_facts import PLAIN, KnownFacts, SourceFacts
from paceline.planning.lab import NO_LOSS, Lab, PairedLoss
from paceline.planning.measured_facts import (
    NO_DRAFTS,
    READ_ALL,
    DraftFacts,
    EngineFacts,
    PromptFacts,
)
from paceline.planning.setups import ALL_ROWS, CacheForm, Goal, Setup
from paceline.planning.streamed_search import StreamedSearch

DEFAULT_DRAFTER = "blend"
_STEP = 1.02  # factor between speeds that count as different


@dataclass(frozen=True)
class Candidate:
    """A setup with what is said of it.

    Attributes:
        setup: the setup.
        forecast: speed and memory by the cost model.
        loss: measured, or the sum of that of its parts; None if unknown.
        loss_measured: the loss is that of the whole setup.
        exact: it changes no output.
        predicted: its engine was not run.
    """

    setup: Setup
    forecast: Forecast
    loss: PairedLoss | None
    loss_measured: bool
    exact: bool
    predicted: bool

    def fits(self, goal: Goal) -> bool:
        """Return whether the memory and the loss are within the goal."""
        if goal.memory is not None and self.forecast.memory > goal.memory:
            return False
        if self.exact:
            return True
        return not goal.exact and self.loss is not None and self.loss.value <= goal.max_loss


@dataclass
class PlanSearch:
    """Measures what is unknown, most promising first, and ranks all setups by forecast.

    Attributes:
        goal: to reach.
        source: the model.
        lab: measures.
        prompts: that speed is about.
        others: bytes of other checkpoints of the same base, by path.
        drafters: that the user names.
        long_text: the text is the user's, and may be long enough for KV policies.
        pruned: why a candidate was left out before it ran, by its name.
    """

    goal: Goal
    source: SourceFacts
    lab: Lab
    prompts: PromptFacts
    others: dict[str, int] = field(default_factory=dict)
    drafters: Sequence[str] = ()
    long_text: bool = False
    pruned: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.goal.context is not None and self.goal.context > self.source.context:
            raise RequestError(
                f"the context is {self.goal.context} tokens, and {self.source.name} sees "
                f"{self.source.context}; ask for fewer"
            )
        self.known = KnownFacts(self.source, self.lab, self.prompts)
        self.streamed = StreamedSearch(self.goal, self.source, self.lab, self.prompts)

    def run(self) -> list[Candidate]:
        """Return all setups that can be judged, the best ones that fit first."""
        weights = self._within_bounds()
        for step in self._steps(weights):
            step()
        self._complete(weights)
        found = list(self._candidates(weights))
        return sorted(found, key=self.rank)

    def beyond(self) -> list[Candidate]:
        """Return setups outside of the goal, small ones measured first, to say what is possible."""
        source = self.source
        every = weight_candidates(
            source.path, source.stored_bytes, source.parameters, self.others, self.goal.exact
        )
        for each in sorted(every, key=lambda each: each.bytes):
            if not each.exact:
                self.lab.loss(each.path, each.format)
            self.known.measure_engine(each.path, each.format, None)
        self._complete(every)
        return list(self._candidates(every))

    def rank(self, candidate: Candidate) -> tuple[float, ...]:
        """Return a key that sorts candidates: those that fit first, then by the preference.

        Of those with the same speed, within 2 %, exact ones come first, then those with fewer
        changes from the defaults, then the smaller ones.
        """
        said, setup = candidate.forecast, candidate.setup
        speed = -float(round(math.log(said.tokens_per_second, _STEP)))
        memory = float(said.memory)
        changes = len(setup.flags()) + (setup.model != self.source.path)
        order = [speed] if self.goal.prefer == "speed" else [memory, speed]
        rest = [not candidate.exact, candidate.predicted, changes, memory, -said.tokens_per_second]
        return (not candidate.fits(self.goal), *order, *rest)

    def confirm(self, candidate: Candidate) -> Candidate:
        """Return a candidate with the loss of the whole setup, measured if there is time."""
        if candidate.exact or candidate.loss_measured:
            return candidate
        setup = candidate.setup
        loss = self.lab.loss(setup.model, setup.format, setup.cache, self._window(setup.cache))
        if loss is None:
            return candidate
        return Candidate(setup, candidate.forecast, loss, True, False, candidate.predicted)

    def _within_bounds(self) -> list[WeightCandidate]:
        source = self.source
        every = weight_candidates(
            source.path, source.stored_bytes, source.parameters, self.others, self.goal.exact
        )
        kept = []
        for each in every:
            reason = out_of_bounds(each, source.stored_bytes, source.page_bytes, self.goal)
            if reason is None:
                kept.append(each)
            else:
                self.pruned[each.name] = reason
        return kept

    def _steps(self, weights: Sequence[WeightCandidate]) -> Iterator[Callable[[], None]]:
        """Yield the measurements in order of what they promise."""
        source, goal = self.source, self.goal
        own = drafter_candidates(self.drafters)
        yield partial(self.known.measure_engine, source.path, STORED, None)
        if self.streamed.possible:
            yield self.streamed.measure
        yield partial(self.known.measure_drafts, PLAIN)
        drafts = [partial(self.known.measure_drafts, name) for name in own]
        forms = [partial(self._measure_weights, each) for each in weights if not each.exact]
        lead = len(self.drafters) + 1
        yield from drafts[:lead]
        yield from forms[:2]
        yield from drafts[lead : lead + 3]
        yield lambda: self.streamed.measure_drafts(self.known.drafts)
        for name in kv_candidates(goal)[1:]:
            yield partial(self._measure_loss, CacheForm(name))
        yield from forms[2:]
        yield from drafts[lead + 3 :]
        for count in thread_candidates(source.threads, source.usable_cores):
            yield partial(self.known.measure_engine, source.path, STORED, count)
        for cache in self._far_caches():
            if cache.attention is not None:
                yield partial(self.known.measure_reads, cache.attention)
            yield partial(self._measure_loss, cache)

    def _far_caches(self) -> list[CacheForm]:
        """Return the policies and patterns that are considered; none without a long text."""
        if not self.long_text:
            return []
        bounded = policies(self.goal, self.prompts.context(self.goal))
        few = attentions(self.goal, self.prompts.cached)
        return [
            *(CacheForm(policy=policy) for policy in bounded),
            *(CacheForm(attention=pattern) for pattern in few),
        ]

    def _measure_weights(self, each: WeightCandidate) -> None:
        """Measure the loss of a checkpoint in a format, and its speed where that is of use."""
        loss = self.lab.loss(each.path, each.format)
        if loss is not None and (loss.value <= self.goal.max_loss or self.goal.memory is not None):
            self.known.measure_engine(each.path, each.format, None)

    def _measure_loss(self, cache: CacheForm) -> None:
        """Measure the loss of a cache beside the model as it is stored."""
        self.lab.loss(self.source.path, STORED, cache, self._window(cache))

    def _window(self, cache: CacheForm) -> int:
        """Return the tokens of a window on which a cache's loss is measured; 0: a usual size."""
        return self.prompts.context(self.goal) if cache.far else 0

    def _complete(self, weights: Sequence[WeightCandidate]) -> None:
        """Bring all times to the machine's speed now, and estimate what was not measured."""
        self.known.complete(weights)
        self.streamed.complete(self.known.stored)

    def _candidates(self, weights: Sequence[WeightCandidate]) -> Iterator[Candidate]:
        """Yield every setup whose parts are known, with its forecast."""
        source, goal = self.source, self.goal
        drafts = {PLAIN: NO_DRAFTS, **self.known.drafts}
        caches = [ALL_ROWS, *self._far_caches()]
        threads = self.known.faster_threads()
        for each in weights:
            if (each.path, each.format, None) not in self.known.engines:
                continue
            for kv_format, form, count in product(kv_candidates(goal), caches, threads):
                cache = form._replace(kv_format=kv_format)
                known = cache.attention is None or cache.attention in self.known.reads
                if not (known and goes_together(cache)):
                    continue
                setup = Setup(each.path, each.format, PLAIN, 0, *cache, threads=count)
                exact = each.exact and cache == ALL_ROWS
                loss, whole = self._loss_of(setup)
                engine = self.known.with_threads(each, count)
                for name, facts in drafts.items():
                    yield from self._drafted(setup, name, facts, engine, (loss, whole, exact))
        for setup, engine, facts in self.streamed.setups(drafts):
            said = forecast(setup, engine, facts, self.prompts, goal)
            yield Candidate(setup, said, NO_LOSS, True, True, engine.predicted)
        if (
            DEFAULT_DRAFTER not in drafts
        ):  # the default, whose budget never drafts where it does not pay
            setup = Setup(source.path)
            engine = self.known.engines[source.path, STORED, None]
            plain = drafts[PLAIN]
            said = forecast(setup, engine, plain, self.prompts, goal, self.known.slowdown(plain))
            yield Candidate(setup, said, NO_LOSS, True, True, engine.predicted)

    def _drafted(
        self,
        setup: Setup,
        drafter: str,
        drafts: DraftFacts,
        engine: EngineFacts,
        known: tuple[PairedLoss | None, bool, bool],
    ) -> Iterator[Candidate]:
        """Yield a setup with each budget of a drafter."""
        loss, whole, exact = known
        values = {**setup.document(), "drafter": drafter}
        auto = Setup(**{**values, "budget": 0 if drafter == PLAIN else "auto"})
        slowdown = self.known.slowdown(drafts)
        reads = READ_ALL if setup.attention is None else self.known.reads[setup.attention]
        reached = 1.0 if drafter == PLAIN else self.known.reached(drafts)
        said = forecast(auto, engine, drafts, self.prompts, self.goal, slowdown, reads, reached)
        yield Candidate(auto, said, loss, whole, exact, engine.predicted)
        if drafter != PLAIN and said.nodes:
            fixed = Setup(**{**values, "budget": said.nodes})
            best = forecast(fixed, engine, drafts, self.prompts, self.goal, slowdown, reads)
            yield Candidate(fixed, best, loss, whole, exact, engine.predicted)

    def _loss_of(self, setup: Setup) -> tuple[PairedLoss | None, bool]:
        """Return the loss of a setup, and whether it was measured as a whole: else of its parts."""
        lab, path, cache = self.lab, self.source.path, setup.cache
        whole = lab.known_loss(setup.model, setup.format, cache, self._window(cache))
        if whole is not None:
            return whole, True
        parts = [lab.known_loss(setup.model, setup.format)]
        if cache.kv_format != "auto":
            parts.append(lab.known_loss(path, STORED, CacheForm(cache.kv_format)))
        if cache.far:
            far = cache._replace(kv_format="auto")
            parts.append(lab.known_loss(path, STORED, far, self._window(far)))
        if None in parts:
            return None, False
        values = [each.value for each in parts if each is not None]
        errors = [each.error or 0.0 for each in parts if each is not None]
        return PairedLoss(sum(values), sum(error**2 for error in errors) ** 0.5), False
