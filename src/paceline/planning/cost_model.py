"""The cost model of the planner: speed, memory and loss of a setup, from a few measurements.

A pass over n nodes beside S cached positions of each of U users takes

    T(n, S, U) = T(n) + U * s * S

with the measured curve T and the measured slope s, scaled by the size of the cache's format and by
the share of that time that an attention pattern leaves, measured at S. A drafter with a budget of b
nodes gains A(b) tokens a pass and takes d seconds for each user:

    tokens/s = U * A(b) / (T(U * (b + 1), S, U) + U * (d + o))

where o is what the decoding loop takes besides. T is the shortest time of passes that were run for
it; how much longer the passes of answers take is measured for plain passes and for full trees, and
interpolated between them. For several users the prompts, which passes read
beside the answers, count too. A format that has not been measured takes its bytes over the memory
bandwidth, or the curve of the measured one scaled by the bytes. Memory is that of weights, keys and
values, drafters, and the logits of a pass. docs/guides/plan.md states what the model leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from paceline.core import Cost
from paceline.engines.pages import PAGE
from paceline.planning.setups import Goal, Setup

MAX_NODES = 16  # largest budget whose acceptance is measured


@dataclass(frozen=True)
class EngineFacts:
    """What was measured of a checkpoint in one format of weights.

    Attributes:
        format: as the engine names it.
        weight_bytes: that every pass reads.
        nodes, seconds: T(n).
        slope: seconds that a cached position adds to a pass, with `fp32` keys and values.
        prefill: seconds of a token of a prompt.
        threads: of the engine.
        page_bytes: of a page of keys and values, by format of the cache.
        vocab_size: tokens.
        predicted: nothing was run: sizes and times are estimates.
        reference: seconds that a plain pass of the planned model took at the same time; 0: unknown.
    """

    format: str
    weight_bytes: int
    nodes: tuple[int, ...]
    seconds: tuple[float, ...]
    slope: float
    prefill: float
    threads: int
    page_bytes: Mapping[str, int]
    vocab_size: int
    predicted: bool = False
    reference: float = 0.0

    def document(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)

    @classmethod
    def parse(cls, found: Mapping[str, Any]) -> EngineFacts:
        """Return what `document` gave.

        Raises:
            ValueError, KeyError, TypeError: it is damaged.
        """
        nodes, seconds = tuple(map(int, found["nodes"])), tuple(map(float, found["seconds"]))
        Cost(nodes, seconds)  # checks them
        facts = cls(
            str(found["format"]),
            int(found["weight_bytes"]),
            nodes,
            seconds,
            float(found["slope"]),
            float(found["prefill"]),
            int(found["threads"]),
            {str(name): int(size) for name, size in found["page_bytes"].items()},
            int(found["vocab_size"]),
            bool(found["predicted"]),
            float(found["reference"]),
        )
        if not (min(seconds) > 0 and facts.prefill > 0 and min(facts.slope, facts.reference) >= 0):
            raise ValueError("times of 0 or less")
        return facts

    def timed(self, reference: float) -> EngineFacts:
        """Return the facts for when a plain pass of the planned model takes `reference`."""
        ratio = _ratio(reference, self.reference)
        return replace(
            self,
            seconds=tuple(ratio * each for each in self.seconds),
            slope=ratio * self.slope,
            prefill=ratio * self.prefill,
            reference=ratio * self.reference,
        )

    def at(self, nodes: float) -> float:
        """Return T(n); beyond the curve it goes on with the slope of its last part."""
        return extended(self.nodes, self.seconds, nodes)

    def pass_seconds(
        self, nodes: int, cached: float, users: int, kv_format: str, read: float = 1.0
    ) -> float:
        """Return the seconds of a pass.

        Args:
            nodes: of all users.
            cached: positions of each user's text that are attended to.
            users: texts in the pass.
            kv_format: of the cache.
            read: share of the time of cached positions that an attention pattern takes.
        """
        share = read * self.kv_bytes(kv_format) / self.kv_bytes("auto")
        return self.at(nodes) + users * self.slope * share * cached

    def kv_bytes(self, kv_format: str) -> int:
        """Return the bytes of a page of keys and values."""
        return self.page_bytes["fp32" if kv_format == "auto" else kv_format]

    def scaled(self, name: str, weight_bytes: int) -> EngineFacts:
        """Return an estimate for another format: times in proportion to the bytes."""
        ratio = weight_bytes / self.weight_bytes
        seconds = tuple(each * ratio for each in self.seconds)
        values = {**self.document(), "format": name, "weight_bytes": weight_bytes}
        return EngineFacts.parse({**values, "seconds": seconds, "predicted": True})


@dataclass(frozen=True)
class ReadFacts:
    """What was measured of an attention pattern.

    Attributes:
        share: of the time that cached positions add to a pass, against reading all of them.
        page_bytes: that it keeps of each page of keys beside them.
    """

    share: float = 1.0
    page_bytes: int = 0

    def document(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)

    @classmethod
    def parse(cls, found: Mapping[str, Any]) -> ReadFacts:
        """Return what `document` gave.

        Raises:
            ValueError, KeyError, TypeError: it is damaged.
        """
        facts = cls(float(found["share"]), int(found["page_bytes"]))
        if not (0 <= facts.share < 1e6 and facts.page_bytes >= 0):
            raise ValueError("a share or a size below 0")
        return facts


READ_ALL = ReadFacts()


def _ratio(now: float, then: float) -> float:
    """Return how many times as slow the machine is as before; 1 if that is unknown."""
    return now / then if now > 0 and then > 0 else 1.0


def extended(nodes: tuple[int, ...], seconds: tuple[float, ...], n: float) -> float:
    """Return a curve at `n`: interpolated, and beyond its end in proportion to the nodes."""
    if n > nodes[-1]:
        return seconds[-1] * n / nodes[-1]
    return Cost(nodes, seconds).at(n)  # type: ignore[arg-type]


@dataclass(frozen=True)
class DraftFacts:
    """What was measured of a drafter on the prompts.

    Attributes:
        gained: tokens that a pass gains with a budget of 0, 1, 2, ... nodes; the first is 1.
        seconds: of drafting and learning, for a pass.
        overhead: seconds of the decoding loop for a pass, beside drafts and the pass itself.
        forward: seconds of a pass with the largest budget; 0 where it was not measured.
        state_bytes: of what it has learnt.
        model_bytes: weights of its own models.
        page_bytes: of a page of keys and values of its own models.
        reference: as of `EngineFacts`.
    """

    gained: tuple[float, ...]
    seconds: float
    overhead: float = 0.0
    forward: float = 0.0
    state_bytes: int = 0
    model_bytes: int = 0
    page_bytes: int = 0
    reference: float = 0.0

    def document(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)

    @classmethod
    def parse(cls, found: Mapping[str, Any]) -> DraftFacts:
        """Return what `document` gave.

        Raises:
            ValueError, KeyError, TypeError: it is damaged.
        """
        gained = tuple(map(float, found["gained"]))
        if not gained or not all(1 <= each < 1e6 for each in gained):
            raise ValueError("no gains")
        state, model, page = (
            int(found[name]) for name in ("state_bytes", "model_bytes", "page_bytes")
        )
        reference = float(found["reference"])
        seconds, overhead, forward = (
            float(found[name]) for name in ("seconds", "overhead", "forward")
        )
        facts = cls(gained, seconds, overhead, forward, state, model, page, reference)
        if not min(seconds, overhead, forward, reference) >= 0:
            raise ValueError("a time below 0")
        return facts

    def timed(self, reference: float) -> DraftFacts:
        """Return the facts for when a plain pass of the planned model takes `reference`."""
        ratio = _ratio(reference, self.reference)
        return replace(
            self,
            seconds=ratio * self.seconds,
            overhead=ratio * self.overhead,
            forward=ratio * self.forward,
            reference=ratio * self.reference,
        )


NO_DRAFTS = DraftFacts((1.0,), 0.0)


@dataclass(frozen=True)
class PromptFacts:
    """The prompts that speed is about.

    Attributes:
        prompt: mean tokens of a prompt.
        answer: tokens of an answer.
    """

    prompt: float
    answer: int

    @property
    def cached(self) -> float:
        """Return the cached positions of a mean pass."""
        return self.prompt + self.answer / 2

    def context(self, goal: Goal) -> int:
        """Return the positions that each user's cache must hold."""
        return goal.context or max(round(self.prompt) + self.answer, 2)


@dataclass(frozen=True)
class Forecast:
    """What the cost model says of a setup.

    Attributes:
        tokens_per_second: of all users together.
        first_token: seconds until the first token of a prompt of mean length.
        memory: bytes at the context and users of the goal.
        nodes: of a tree beyond its root.
    """

    tokens_per_second: float
    first_token: float
    memory: int
    nodes: int


@dataclass(frozen=True)
class Slowdown:
    """How many times as long the passes of answers take as those of the measured curve.

    Attributes:
        plain: of passes without drafts.
        full: of passes with the largest trees.
    """

    plain: float = 1.0
    full: float = 1.0

    @classmethod
    def of(
        cls, engine: EngineFacts, plain: DraftFacts, drafts: DraftFacts, prompts: PromptFacts
    ) -> Slowdown:
        """Return that of a drafter with the engine in which it was measured."""
        if engine.predicted or not plain.forward:
            return cls()
        cached = prompts.cached
        one = plain.forward / engine.pass_seconds(1, cached, 1, "auto")
        if not drafts.forward:
            return cls(one, one)
        return cls(one, drafts.forward / engine.pass_seconds(MAX_NODES + 1, cached, 1, "auto"))

    def at(self, nodes: int) -> float:
        """Return that of trees with so many nodes beyond the root."""
        return self.plain + (self.full - self.plain) * min(nodes / MAX_NODES, 1.0)


def forecast(
    setup: Setup,
    engine: EngineFacts,
    drafts: DraftFacts,
    prompts: PromptFacts,
    goal: Goal,
    slowdown: Slowdown = Slowdown(),
    reads: ReadFacts = READ_ALL,
) -> Forecast:
    """Return speed and memory of a setup.

    Args:
        setup: the setup.
        engine: of its checkpoint, format and threads.
        drafts: of its drafter.
        prompts: that are decoded.
        goal: gives context and users.
        slowdown: of passes against the engine's curve.
        reads: of its attention pattern.
    """
    cached, rows = prompts.cached, cache_rows(setup, prompts.context(goal))
    if setup.kv_policy is not None:
        cached = min(cached, rows)
    choices = range(len(drafts.gained)) if setup.budget == "auto" else [int(setup.budget)]

    def speed(nodes: int) -> float:
        gained = drafts.gained[min(nodes, len(drafts.gained) - 1)]
        size = goal.users * (nodes + 1)
        seconds = engine.pass_seconds(size, cached, goal.users, setup.kv_format, reads.share)
        seconds *= slowdown.at(nodes)
        seconds += goal.users * (drafts.overhead + (drafts.seconds if nodes else 0.0))
        if goal.users > 1:  # of the prompts, for each pass of the answers
            seconds += goal.users * prompts.prompt * engine.prefill * gained / prompts.answer
        return goal.users * gained / seconds

    nodes = max(choices, key=speed)
    first = prompts.prompt * engine.prefill
    first += engine.pass_seconds(1, prompts.prompt, 1, setup.kv_format, reads.share)
    memory = memory_of(setup, engine, drafts, prompts, goal, reads)
    return Forecast(speed(nodes), first, memory, nodes)


def cache_rows(setup: Setup, context: int) -> int:
    """Return the rows that a head of a user's cache holds at most."""
    if setup.kv_policy is None:
        return context
    from paceline.kvcache.base import parse_policy

    return parse_policy(setup.kv_policy).max_rows(context)


def memory_of(
    setup: Setup,
    engine: EngineFacts,
    drafts: DraftFacts,
    prompts: PromptFacts,
    goal: Goal,
    reads: ReadFacts = READ_ALL,
) -> int:
    """Return the bytes of weights, keys and values, drafters and the logits of a pass."""
    context = prompts.context(goal)
    nodes = MAX_NODES if setup.budget == "auto" else int(setup.budget)
    tree = 1 if setup.plain else nodes + 1
    pages = -(-(cache_rows(setup, context) + tree) // PAGE)
    page = engine.kv_bytes(setup.kv_format) + reads.page_bytes
    total = engine.weight_bytes + goal.users * pages * page
    total += 2 * goal.users * tree * engine.vocab_size * 4
    if not setup.plain:
        total += drafts.state_bytes + drafts.model_bytes
        total += goal.users * -(-context // PAGE) * drafts.page_bytes
    return total


def estimated_bytes(parameters: int, bits: float) -> int:
    """Return the bytes of so many weights in a format."""
    return round(parameters * bits / 8)
