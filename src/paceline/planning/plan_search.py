"""Searches for the setup that reaches a goal: bounds, measurements, forecasts, and a ranking."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product

from paceline.engines.pages import PAGE
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
from paceline.planning.cost_model import (
    MAX_NODES,
    NO_DRAFTS,
    READ_ALL,
    DraftFacts,
    EngineFacts,
    Forecast,
    PromptFacts,
    ReadFacts,
    Slowdown,
    forecast,
)
from paceline.planning.lab import NO_LOSS, Lab, PairedLoss
from paceline.planning.setups import ALL_ROWS, CacheForm, Goal, Setup

_UNMEASURED_NODES = (1, 2, 4, 8, 16, 32, 64)
PLAIN, DEFAULT_DRAFTER = "plain", "blend"
_DRAFTER_BYTES = 16_000_000  # of what a drafter has learnt, until it is measured
_STEP = 1.02  # factor between speeds that count as different
_FASTER = 1.02  # by which other threads must be faster to be considered


@dataclass(frozen=True)
class SourceFacts:
    """What is known of the planned model before anything runs.

    Attributes:
        path: as `LM` takes it.
        name: for the user.
        stored_bytes: of its weights as they are stored.
        parameters: number of its weights.
        page_bytes: of a page of keys and values, by format.
        vocab_size: tokens.
        context: positions that it sees.
        usable_cores: of this machine.
        threads: that engines take by default.
    """

    path: str
    name: str
    stored_bytes: int
    parameters: int
    page_bytes: dict[str, int]
    vocab_size: int
    context: int
    usable_cores: int
    threads: int


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
    _engines: dict[tuple[str, str, int | None], EngineFacts] = field(default_factory=dict)
    _drafts: dict[str, DraftFacts] = field(default_factory=dict)
    _reads: dict[str, ReadFacts] = field(default_factory=dict)
    _streamed: EngineFacts | None = None

    def __post_init__(self) -> None:
        if self.goal.context is not None and self.goal.context > self.source.context:
            raise RequestError(
                f"the context is {self.goal.context} tokens, and {self.source.name} sees "
                f"{self.source.context}; ask for fewer"
            )

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
            self._measure_engine(each.path, each.format, None)
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

    @property
    def weights_memory(self) -> int | None:
        """Bytes that the goal leaves for weights, where they do not fit; None where they do."""
        source, goal = self.source, self.goal
        if goal.memory is None:
            return None
        rows = self.prompts.context(goal) + MAX_NODES + 1
        rest = goal.users * -(-rows // PAGE) * source.page_bytes["fp32"] + _DRAFTER_BYTES
        rest += 2 * goal.users * (MAX_NODES + 1) * source.vocab_size * 4  # logits
        left = goal.memory - rest
        return left if 0 < left < source.stored_bytes else None

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
        yield partial(self._measure_engine, source.path, STORED, None)
        if self.weights_memory is not None:
            yield partial(self._measure_streamed, self.weights_memory)
        yield partial(self._measure_drafts, PLAIN)
        drafts = [partial(self._measure_drafts, name) for name in own]
        forms = [partial(self._measure_weights, each) for each in weights if not each.exact]
        lead = len(self.drafters) + 1
        yield from drafts[:lead]
        yield from forms[:2]
        yield from drafts[lead : lead + 3]
        for name in kv_candidates(goal)[1:]:
            yield partial(self._measure_loss, CacheForm(name))
        yield from forms[2:]
        yield from drafts[lead + 3 :]
        for count in thread_candidates(source.threads, source.usable_cores):
            yield partial(self._measure_engine, source.path, STORED, count)
        for cache in self._far_caches():
            if cache.attention is not None:
                yield partial(self._measure_reads, cache.attention)
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

    def _measure_reads(self, pattern: str) -> None:
        facts = self.lab.reads(pattern, round(self.prompts.cached))
        if facts is not None:
            self._reads[pattern] = facts

    def _measure_engine(self, path: str, name: str, threads: int | None) -> None:
        facts = self.lab.engine(path, name, threads)
        if facts is not None:
            self._engines[path, name, threads] = facts
        elif (path, name, threads) == (
            self.source.path,
            STORED,
            None,
        ) and STORED in self.lab.failed:
            raise RequestError(f"{self.source.name} cannot be planned: {self.lab.failed[STORED]}")

    def _measure_streamed(self, weights_memory: int) -> None:
        self._streamed = self.lab.engine(self.source.path, STORED, None, weights_memory)

    def _measure_weights(self, each: WeightCandidate) -> None:
        """Measure the loss of a checkpoint in a format, and its speed where that is of use."""
        loss = self.lab.loss(each.path, each.format)
        if loss is not None and (loss.value <= self.goal.max_loss or self.goal.memory is not None):
            self._measure_engine(each.path, each.format, None)

    def _measure_loss(self, cache: CacheForm) -> None:
        """Measure the loss of a cache beside the model as it is stored."""
        self.lab.loss(self.source.path, STORED, cache, self._window(cache))

    def _measure_drafts(self, name: str) -> None:
        facts = self.lab.drafts(name)
        if facts is not None:
            self._drafts[name] = facts

    def _window(self, cache: CacheForm) -> int:
        """Return the tokens of a window on which a cache's loss is measured; 0: a usual size."""
        return self.prompts.context(self.goal) if cache.far else 0

    def _complete(self, weights: Sequence[WeightCandidate]) -> None:
        """Bring all times to the machine's speed now, and estimate what was not measured."""
        now = self.lab.reference()
        self._engines = {key: each.timed(now) for key, each in self._engines.items()}
        self._drafts = {name: each.timed(now) for name, each in self._drafts.items()}
        stored = self._engines.get((self.source.path, STORED, None))
        if stored is None:
            stored = self._engines[self.source.path, STORED, None] = self._estimate()
        for each in weights:
            name = f"{'' if each.path == self.source.path else each.path + ' '}{each.format}"
            refused = name in self.lab.failed or f"the loss of {name}" in self.lab.failed
            if (each.path, each.format, None) not in self._engines and not refused:
                facts = stored.scaled(each.format, each.bytes)
                self._engines[each.path, each.format, None] = facts

    def _estimate(self) -> EngineFacts:
        """Return what the stored model would take if only memory bandwidth mattered."""
        source = self.source
        bandwidth = self.lab.bandwidth()
        once = source.stored_bytes / bandwidth
        seconds = tuple(once * max(1.0, n / 8) for n in _UNMEASURED_NODES)
        slope = source.page_bytes["fp32"] / 64 / bandwidth
        return EngineFacts(
            "as stored",
            source.stored_bytes,
            _UNMEASURED_NODES,
            seconds,
            slope,
            seconds[-1] / _UNMEASURED_NODES[-1],
            source.threads,
            source.page_bytes,
            source.vocab_size,
            predicted=True,
        )

    def _candidates(self, weights: Sequence[WeightCandidate]) -> Iterator[Candidate]:
        """Yield every setup whose parts are known, with its forecast."""
        source, goal = self.source, self.goal
        drafts = {PLAIN: NO_DRAFTS, **self._drafts}
        caches = [ALL_ROWS, *self._far_caches()]
        threads = self._faster_threads()
        for each in weights:
            if (each.path, each.format, None) not in self._engines:
                continue
            for kv_format, form, count in product(kv_candidates(goal), caches, threads):
                cache = form._replace(kv_format=kv_format)
                known = cache.attention is None or cache.attention in self._reads
                if not (known and goes_together(cache)):
                    continue
                setup = Setup(each.path, each.format, PLAIN, 0, *cache, threads=count)
                exact = each.exact and cache == ALL_ROWS
                loss, whole = self._loss_of(setup)
                engine = self._with_threads(each, count)
                for name, facts in drafts.items():
                    yield from self._drafted(setup, name, facts, engine, (loss, whole, exact))
        if self._streamed is not None:
            setup = Setup(source.path, weights_memory=self.weights_memory)
            for name, facts in drafts.items():
                yield from self._drafted(setup, name, facts, self._streamed, (NO_LOSS, True, True))
        if (
            DEFAULT_DRAFTER not in drafts
        ):  # the default, whose budget never drafts where it does not pay
            setup = Setup(source.path)
            engine = self._engines[source.path, STORED, None]
            said = forecast(setup, engine, NO_DRAFTS, self.prompts, goal)
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
        slowdown = self._slowdown(drafts)
        reads = READ_ALL if setup.attention is None else self._reads[setup.attention]
        said = forecast(auto, engine, drafts, self.prompts, self.goal, slowdown, reads)
        yield Candidate(auto, said, loss, whole, exact, engine.predicted)
        if drafter != PLAIN and said.nodes:
            fixed = Setup(**{**values, "budget": said.nodes})
            best = forecast(fixed, engine, drafts, self.prompts, self.goal, slowdown, reads)
            yield Candidate(fixed, best, loss, whole, exact, engine.predicted)

    def _slowdown(self, drafts: DraftFacts) -> Slowdown:
        stored = self._engines[self.source.path, STORED, None]
        plain = self._drafts.get(PLAIN, NO_DRAFTS)
        return Slowdown.of(stored, plain, drafts, self.prompts)

    def _faster_threads(self) -> list[int | None]:
        """Return None for the default threads, and other numbers that are clearly faster."""
        stored = self._engines[self.source.path, STORED, None]
        found: list[int | None] = [None]
        for count in thread_candidates(self.source.threads, self.source.usable_cores):
            facts = self._engines.get((self.source.path, STORED, count))
            if facts and not stored.predicted and facts.at(1) * _FASTER < stored.at(1):
                found.append(count)
        return found

    def _with_threads(self, each: WeightCandidate, count: int | None) -> EngineFacts:
        """Return a format's facts with other threads: as much faster as the stored one is."""
        facts = self._engines[each.path, each.format, None]
        if count is None:
            return facts
        if (each.path, each.format, count) in self._engines:
            return self._engines[each.path, each.format, count]
        stored = self._engines[self.source.path, STORED, None]
        ratio = self._engines[self.source.path, STORED, count].at(1) / stored.at(1)
        seconds = tuple(ratio * value for value in facts.seconds)
        return EngineFacts.parse({**facts.document(), "seconds": seconds, "predicted": True})

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
