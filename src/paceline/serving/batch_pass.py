"""One pass of a worker: what it runs, and what is known of it until its logits are there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from paceline.engines.base import Cached
from paceline.serving.batch_entry import BatchEntry
from paceline.serving.drafter_pool import Decision, DrafterPool
from paceline.serving.pass_budget import PassBudget


@dataclass(eq=False)
class PoolTrees:
    """The trees of one pool's drafters.

    Attributes:
        pool: see above.
        entries: with the trees.
        decision: how they were sized.
    """

    pool: DrafterPool
    entries: list[BatchEntry]
    decision: Decision


@dataclass(eq=False)
class StartedPass:
    """A pass that the engine has begun, or will run when it is asked for the logits.

    Attributes:
        entries: in the order of the batch.
        sequences: of the entries when it was begun; a request that has been closed since has
            another one, or none.
        started: what `Engine.begin` returned; None: it was not begun.
    """

    entries: list[BatchEntry]
    sequences: list[Cached | None]
    started: object | None = None

    def kept(self) -> list[bool]:
        """Return for each entry whether its request still runs on what was begun."""
        pairs = zip(self.entries, self.sequences, strict=True)
        return [
            sequence is not None and entry.run.active is sequence and not entry.error
            for entry, sequence in pairs
        ]


@dataclass(eq=False)
class BatchPass:
    """A pass from its schedule to its commit.

    Attributes:
        parts: parts of prompts.
        decoding: requests that get a tree.
        max_nodes: maximum nodes of each tree.
        budget: prompt tokens that draft models and guides may still read.
        ready: those of `decoding` whose draft models and guides have caught up.
        groups: the trees by the pool of their drafter.
        started: the forward pass; None before.
        begun: when its guides began, on the clock of `perf_counter`: their time is the pass's, too.
    """

    parts: list[BatchEntry]
    decoding: list[BatchEntry]
    max_nodes: int
    budget: PassBudget
    ready: list[BatchEntry] = field(default_factory=list)
    groups: list[PoolTrees] = field(default_factory=list)
    started: StartedPass | None = None
    begun: float = 0.0

    @property
    def entries(self) -> list[BatchEntry]:
        """All requests of the pass."""
        return [*self.parts, *self.decoding]

    def waiting(self) -> Iterator[BatchEntry]:
        """Yield those that take memory when the logits are asked for."""
        if self.started is not None:
            kept = zip(self.started.entries, self.started.kept(), strict=True)
            yield from (entry for entry, still in kept if still)
