"""What is measured for the planner's cost model: engines, attention patterns, drafters, prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paceline.core import Cost
from paceline.planning.setups import Goal

MAX_NODES = 16  # largest budget whose acceptance is measured, unless weights stream from disk


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
        streamed: bytes of weights that every pass reads from disk.
        batch_overhead: seconds that each text of a batch adds to a plain pass, beside the pass
            itself; 0 where it was not measured.
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
    streamed: int = 0
    batch_overhead: float = 0.0

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
            int(found["streamed"]),
            float(found["batch_overhead"]),
        )
        if not (
            min(seconds) > 0
            and facts.prefill > 0
            and min(facts.slope, facts.reference, facts.streamed, facts.batch_overhead) >= 0
        ):
            raise ValueError("times of 0 or less")
        return facts

    def timed(self, reference: float) -> EngineFacts:
        """Return the facts for when a plain pass of the planned model takes `reference`."""
        return self._slower(_ratio(reference, self.reference))

    def with_pass(self, seconds: float) -> EngineFacts:
        """Return the facts for when a plain pass of this engine takes `seconds`; 0: unknown."""
        return self._slower(_ratio(seconds, self.seconds[0]))

    def with_weights(self, weight_bytes: int) -> EngineFacts:
        """Return the facts with other bytes of weights in memory: the rest is read from disk.

        Every pass takes as much longer as the disk needs for the additional bytes, by the time of a
        plain pass, most of which is reading.
        """
        more = max(self.weight_bytes - weight_bytes, round(-0.9 * self.streamed))
        extra = more / self.streamed * self.seconds[0]
        return replace(
            self,
            weight_bytes=weight_bytes,
            streamed=self.streamed + more,
            seconds=tuple(each + extra for each in self.seconds),
        )

    def at(self, nodes: float) -> float:
        """Return T(n); see `at_each`."""
        return float(self.at_each(nodes))

    def at_each(self, nodes: ArrayLike) -> NDArray[np.float64]:
        """Return T(n) of each size: interpolated, and beyond the curve in proportion to n."""
        sizes, last = np.asarray(nodes, np.float64), self.nodes[-1]
        return np.interp(sizes, self.nodes, self.seconds) * np.maximum(sizes / last, 1.0)

    def _slower(self, ratio: float) -> EngineFacts:
        return replace(
            self,
            seconds=tuple(ratio * each for each in self.seconds),
            slope=ratio * self.slope,
            prefill=ratio * self.prefill,
            reference=ratio * self.reference,
            batch_overhead=ratio * self.batch_overhead,
        )

    def pass_seconds(
        self, nodes: float, cached: float, users: int, kv_format: str, read: float = 1.0
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
        sizes: nodes of a pass beyond the root, in the mean, with each budget; empty: the budget.
        likely_gained, likely_sizes: the same where each pass keeps the nodes above some path
            probability, for several of those.
        automatic: seconds of a token with an automatic budget; 0 where it was not measured.
    """

    gained: tuple[float, ...]
    seconds: float
    overhead: float = 0.0
    forward: float = 0.0
    state_bytes: int = 0
    model_bytes: int = 0
    page_bytes: int = 0
    reference: float = 0.0
    sizes: tuple[float, ...] = ()
    likely_gained: tuple[float, ...] = ()
    likely_sizes: tuple[float, ...] = ()
    automatic: float = 0.0

    @property
    def budget(self) -> int:
        """Return the largest budget whose acceptance was measured."""
        return len(self.gained) - 1

    @property
    def nodes(self) -> tuple[float, ...]:
        """Return the nodes of a pass beyond the root, in the mean, with each budget."""
        return self.sizes or tuple(map(float, range(len(self.gained))))

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
        seconds, overhead, forward, automatic = (
            float(found[name]) for name in ("seconds", "overhead", "forward", "automatic")
        )
        sizes = tuple(map(float, found["sizes"]))
        if sizes and (len(sizes) != len(gained) or not all(0 <= n < 1e6 for n in sizes)):
            raise ValueError("other sizes than gains")
        likely, nodes = (
            tuple(map(float, found[name])) for name in ("likely_gained", "likely_sizes")
        )
        if len(likely) != len(nodes) or not all(0 <= n < 1e6 for n in (*likely, *nodes)):
            raise ValueError("other likely sizes than gains")
        times = (seconds, overhead, forward)
        facts = cls(gained, *times, state, model, page, reference, sizes, likely, nodes, automatic)
        if not min(*times, reference, automatic) >= 0:
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
            automatic=ratio * self.automatic,
            reference=ratio * self.reference,
        )


NO_DRAFTS = DraftFacts((1.0,), 0.0)


@dataclass(frozen=True)
class PromptFacts:
    """The prompts that speed is about.

    Attributes:
        prompt: mean tokens of a prompt.
        answer: tokens of an answer.
        sizes: tokens of each prompt; empty: all have the mean.
    """

    prompt: float
    answer: int
    sizes: tuple[int, ...] = ()

    @property
    def cached(self) -> float:
        """Return the cached positions of a mean pass."""
        return self.prompt + self.answer / 2

    def of_users(self, users: int) -> list[int]:
        """Return the tokens of each user's prompt; users take the prompts in turns."""
        sizes = self.sizes or (max(round(self.prompt), 1),)
        return [sizes[user % len(sizes)] for user in range(users)]

    def context(self, goal: Goal) -> int:
        """Return the positions that each user's cache must hold."""
        return goal.context or max(round(self.prompt) + self.answer, 2)
