"""What a search knows of engines and drafters: measured so far, and estimates of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from paceline.errors import RequestError
from paceline.planning.candidates import STORED, WeightCandidate, thread_candidates
from paceline.planning.cost_model import Slowdown, share_reached
from paceline.planning.lab import Lab
from paceline.planning.measured_facts import (
    NO_DRAFTS,
    DraftFacts,
    EngineFacts,
    PromptFacts,
    ReadFacts,
)
from paceline.planning.setups import Setup

PLAIN = "plain"
_UNMEASURED_NODES = (1, 2, 4, 8, 16, 32, 64)
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


@dataclass
class KnownFacts:
    """Measurements of one search.

    Attributes:
        source: the model.
        lab: measures.
        prompts: that speed is about.
        engines: by checkpoint, format and threads.
        drafts: by drafter.
        reads: by attention pattern.
    """

    source: SourceFacts
    lab: Lab
    prompts: PromptFacts
    engines: dict[tuple[str, str, int | None], EngineFacts] = field(default_factory=dict)
    drafts: dict[str, DraftFacts] = field(default_factory=dict)
    reads: dict[str, ReadFacts] = field(default_factory=dict)

    @property
    def stored(self) -> EngineFacts | None:
        """Return the facts of the model as it is stored; None before they are known."""
        return self.engines.get((self.source.path, STORED, None))

    def measure_engine(self, path: str, name: str, threads: int | None) -> None:
        """Measure a checkpoint in a format.

        Raises:
            RequestError: it is the planned model as it is stored, and cannot be run.
        """
        facts = self.lab.engine(path, name, threads)
        if facts is not None:
            self.engines[path, name, threads] = facts
        elif (path, name, threads) == (self.source.path, STORED, None):
            reason = self.lab.failed.get(STORED)
            if reason is not None:
                raise RequestError(f"{self.source.name} cannot be planned: {reason}")

    def measure_drafts(self, name: str) -> None:
        """Measure what a drafter gains."""
        facts = self.lab.drafts(name)
        if facts is not None:
            self.drafts[name] = facts

    def measure_reads(self, pattern: str) -> None:
        """Measure what an attention pattern reads."""
        facts = self.lab.reads(pattern, round(self.prompts.cached))
        if facts is not None:
            self.reads[pattern] = facts

    def complete(self, weights: Sequence[WeightCandidate]) -> None:
        """Bring all times to the machine's speed now, and estimate what was not measured."""
        now = self.lab.reference()
        self.engines = {key: each.timed(now) for key, each in self.engines.items()}
        self.drafts = {name: each.timed(now) for name, each in self.drafts.items()}
        stored = self.stored
        if stored is None:
            stored = self.engines[self.source.path, STORED, None] = self._estimate()
        for each in weights:
            name = f"{'' if each.path == self.source.path else each.path + ' '}{each.format}"
            refused = name in self.lab.failed or f"the loss of {name}" in self.lab.failed
            if (each.path, each.format, None) not in self.engines and not refused:
                facts = stored.scaled(each.format, each.bytes)
                self.engines[each.path, each.format, None] = facts

    def slowdown(self, drafts: DraftFacts) -> Slowdown:
        """Return that of passes with a drafter's trees, against the stored model's curve."""
        stored = self.stored
        if stored is None:
            return Slowdown()
        return Slowdown.of(stored, self.drafts.get(PLAIN, NO_DRAFTS), drafts, self.prompts)

    def reached(self, drafts: DraftFacts) -> float:
        """Return the share of the best speed that an automatic budget reached with a drafter."""
        stored = self.stored
        if stored is None:
            return 1.0
        setup = Setup(self.source.path, budget="auto")
        return share_reached(setup, stored, drafts, self.prompts, self.slowdown(drafts))

    def faster_threads(self) -> list[int | None]:
        """Return None for the default threads, and other numbers that are clearly faster."""
        stored, counts = self.stored, list[int | None]([None])
        if stored is None or stored.predicted:
            return counts
        for count in thread_candidates(self.source.threads, self.source.usable_cores):
            facts = self.engines.get((self.source.path, STORED, count))
            if facts and facts.at(1) * _FASTER < stored.at(1):
                counts.append(count)
        return counts

    def with_threads(self, each: WeightCandidate, count: int | None) -> EngineFacts:
        """Return a format's facts with other threads: as much faster as the stored one is."""
        facts, stored = self.engines[each.path, each.format, None], self.stored
        if count is None or stored is None:
            return facts
        if (each.path, each.format, count) in self.engines:
            return self.engines[each.path, each.format, count]
        ratio = self.engines[self.source.path, STORED, count].at(1) / stored.at(1)
        seconds = tuple(ratio * value for value in facts.seconds)
        return EngineFacts.parse({**facts.document(), "seconds": seconds, "predicted": True})

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
