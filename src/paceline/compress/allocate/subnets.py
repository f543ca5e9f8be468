"""Search for Efficient LLMs: an evolution of sub-networks that starts from importance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from paceline.compress.allocate.base import Allocation, Allocator, Judge, Problem, mutate
from paceline.core import Exactness
from paceline.registry import Source, allocators, check_range


@allocators.register("subnets", Exactness.LOSSY)
@dataclass(frozen=True)
class Subnets(Allocator):
    """Mutate and cross the best sub-networks, beginning with those that importance suggests.

    The first generation are mutations of the allocation with the smallest sum of estimated losses.
    The best few of each generation are parents of the next: a half of their children are mutations,
    the others crossings of two. Sub-networks inherit the weights that importance keeps, and
    `shape` and `narrow` reform these with what was left out, by least squares.

    Attributes:
        generations: of the search, 0 to 100000. Default 12.
        population: children of a generation, 2 to 1000. Default 10.
        parents: that have children, 1 to 1000. Default 4.
        tokens: that a sub-network is judged on, 16 to 1000000. Default 1024.
        seed: of mutation and crossing. Default 0.
    """

    generations: int = 12
    population: int = 10
    parents: int = 4
    tokens: int = 1024
    seed: int = 0

    source = Source(
        authors="Shen et al.",
        title="Search for Efficient Large Language Models",
        arxiv="2409.17372",
        section="section 3",
        note="levels of attention and MLP of each layer instead of masks; the reformation is a "
        "least-squares fit",
    )
    catalogue = (123,)
    examples = ("subnets", "subnets:generations=1,population=2,parents=1,tokens=32")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(0, 100_000, self.name, generations=self.generations)
        check_range(2, 1000, self.name, population=self.population)
        check_range(1, 1000, self.name, parents=self.parents)

    @property
    def evaluations(self) -> int:
        """See `Allocator`."""
        return 2 + self.population * (self.generations + 1)

    def search(self, problem: Problem, tick: Callable[[int], None]) -> Allocation:
        """See `Allocator`."""
        judge = Judge(problem, tick)
        draws = np.random.default_rng((self.seed, 2**32))
        start = problem.cheapest()
        people = [problem.uniform(), start]
        people += [mutate(problem, start, draws) for _ in range(self.population)]
        best = judge.ranked(list(dict.fromkeys(people)), self.tokens)[: self.parents]
        for generation in range(self.generations):
            draws = np.random.default_rng((self.seed, generation))
            children = []
            for number in range(self.population):
                one, other = (best[at] for at in draws.integers(len(best), size=2))
                crossed = _crossed(problem, one, other, draws) if number % 2 else None
                children.append(crossed or mutate(problem, one, draws))
            people = list(dict.fromkeys([*best, *children]))
            best = judge.ranked(people, self.tokens)[: self.parents]
        return best[0]


def _crossed(
    problem: Problem, one: Allocation, other: Allocation, draws: np.random.Generator
) -> Allocation | None:
    """Return one's levels up to a unit and the other's behind it; None where that does not fit."""
    cut = int(draws.integers(len(one)))
    child = (*one[:cut], *other[cut:])
    return child if problem.bytes_of(child) <= problem.budget else None
