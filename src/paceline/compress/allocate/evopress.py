"""EvoPress: an evolution of allocations, each generation judged on more and more tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from paceline.compress.allocate.base import Allocation, Allocator, Judge, Problem, mutate
from paceline.core import Exactness
from paceline.registry import Source, allocators, check_range

_SPREADS = (1.0, 0.5)  # of the estimates whose allocations the search may start from


@allocators.register("evopress", Exactness.LOSSY)
@dataclass(frozen=True)
class EvoPress(Allocator):
    """Mutate the best allocation, and keep what loses least; the parent stays if none is better.

    A mutation moves a few matrices a level up and others down, so that the bytes stay the same. All
    offspring of a generation are judged on few tokens, the best quarter of them and their parent on
    all. The search starts from the best of three: all matrices alike, and two allocations by
    gradients.

    Attributes:
        generations: of the search, 0 to 100000. Default 20.
        offspring: allocations of a generation, 1 to 1000. Default 6.
        tokens: that an allocation is judged on in the end, 16 to 1000000. Default 2048.
        first_tokens: that all offspring are judged on first, at most `tokens`. Default 512.
        seed: of the mutations. Default 0.
    """

    generations: int = 20
    offspring: int = 6
    tokens: int = 2048
    first_tokens: int = 512
    seed: int = 0

    source = Source(
        authors="Sieberling et al.",
        title="EvoPress: Towards Optimal Dynamic Model Compression via Evolutionary Search",
        arxiv="2410.14649",
        section="section 3, algorithm 1",
        note="bytes instead of numbers of levels; also starts from allocations by gradients; "
        "every generation sees the same texts, so that losses are kept",
    )
    catalogue = (185,)
    examples = ("evopress", "evopress:generations=2,offspring=2,tokens=64,first_tokens=32")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(0, 100_000, self.name, generations=self.generations)
        check_range(1, 1000, self.name, offspring=self.offspring)
        check_range(1, self.tokens, self.name, first_tokens=self.first_tokens)

    @property
    def evaluations(self) -> int:
        """See `Allocator`."""
        return 1 + len(_SPREADS) + self.generations * (self.offspring + self._survivors)

    @property
    def _survivors(self) -> int:
        """Offspring that are judged on all tokens."""
        return max(1, self.offspring // 4)

    def search(self, problem: Problem, tick: Callable[[int], None]) -> Allocation:
        """See `Allocator`."""
        judge = Judge(problem, tick)
        starts = [problem.uniform(), *(problem.cheapest(each) for each in _SPREADS)]
        parent = judge.best(starts, self.tokens)
        for generation in range(self.generations):
            draws = np.random.default_rng((self.seed, generation))
            children = list(
                dict.fromkeys(mutate(problem, parent, draws) for _ in range(self.offspring))
            )
            if len(children) > self._survivors and self.first_tokens < self.tokens:
                children = judge.ranked(children, self.first_tokens)[: self._survivors]
            parent = judge.best([parent, *children], self.tokens)
        return parent
