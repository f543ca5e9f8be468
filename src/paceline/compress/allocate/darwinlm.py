"""DarwinLM: an evolution whose offspring are judged after a little training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from paceline.compress.allocate.base import Allocation, Allocator, Judge, Problem, mutate
from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.registry import Source, allocators, check_range


@allocators.register("darwinlm", Exactness.LOSSY)
@dataclass(frozen=True)
class DarwinLM(Allocator):
    """Mutate the best allocation, train all offspring a little, and drop the worst of them.

    Selection has steps: each trains the norms and biases of what is left on twice as many tokens
    as the one before, towards the original, and keeps half of it; the last one decides between the
    parent and the best child. So the model that is easiest to train counts, not the one that is
    best without training; follow with `recover`.

    Attributes:
        generations: of the search, 0 to 100000. Default 8.
        offspring: allocations of a generation, 1 to 1000. Default 6.
        steps: of selection, 1 to 10. Default 2.
        tokens: that offspring are trained on in the first step, 16 to 1000000. Default 1024.
        seed: of the mutations. Default 0.
    """

    generations: int = 8
    offspring: int = 6
    steps: int = 2
    tokens: int = 1024
    seed: int = 0

    source = Source(
        authors="Tang et al.",
        title="DarwinLM: Evolutionary Structured Pruning of Large Language Models",
        arxiv="2502.07780",
        section="section 3, algorithm 2",
        note="norms and biases are trained, not all weights; every allocation anew from the levels",
    )
    catalogue = (203,)
    missing = {203: "the long training of the winner, which is `recover`"}
    examples = ("darwinlm", "darwinlm:generations=1,offspring=2,tokens=64,steps=1")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(0, 100_000, self.name, generations=self.generations)
        check_range(1, 1000, self.name, offspring=self.offspring)
        check_range(1, 10, self.name, steps=self.steps)

    @property
    def max_tokens(self) -> int:
        """See `Allocator`; texts are trained on again where a step asks for more."""
        return 2 * self.tokens

    @property
    def evaluations(self) -> int:
        """See `Allocator`."""
        left, total = self.offspring, 0
        for _ in range(self.steps):
            total += left + 1
            left = max(1, left // 2)
        return 2 + self.generations * total

    def search(self, problem: Problem, tick: Callable[[int], None]) -> Allocation:
        """See `Allocator`.

        Raises:
            MethodError: the levels cannot be trained.
        """
        if problem.trained_loss is None:
            raise MethodError(f"{self.name} trains what it judges, and these levels cannot be")
        judge = Judge(problem, tick, problem.trained_loss)
        parent = judge.best([problem.uniform(), problem.cheapest()], self.tokens)
        for generation in range(self.generations):
            draws = np.random.default_rng((self.seed, generation))
            left = list(
                dict.fromkeys(mutate(problem, parent, draws) for _ in range(self.offspring))
            )
            for step in range(self.steps):
                tokens = self.tokens << step
                last = step + 1 == self.steps
                ranked = judge.ranked([parent, *left] if last else left, tokens)
                left = ranked[: max(1, len(left) // 2)]
            parent = left[0]
        return parent
