"""LLaMA-NAS: a genetic search for all good trade-offs of loss and cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paceline.compress.allocate.base import Allocation, Allocator, Judge, Problem, mutate
from paceline.core import Exactness
from paceline.registry import Source, allocators, check_range


@allocators.register("llama_nas", Exactness.LOSSY)
@dataclass(frozen=True)
class LLaMANAS(Allocator):
    """Breed allocations by crossover and mutation, and keep those that none beats in loss and cost.

    Survivors of a generation are chosen as in NSGA-II: by how many fronts of better ones lie before
    them, and within a front those that are farthest from their neighbours. The population holds
    allocations below the budget, too; the one with the smallest loss counts.

    Attributes:
        generations: of the search, 0 to 100000. Default 12.
        population: allocations of a generation, 2 to 1000. Default 10.
        tokens: that an allocation is judged on, 16 to 1000000. Default 1024.
        seed: of crossover and mutation. Default 0.
    """

    generations: int = 12
    population: int = 10
    tokens: int = 1024
    seed: int = 0

    source = Source(
        authors="Sarah et al.",
        title="LLaMA-NAS: Efficient Neural Architecture Search for Large Language Models",
        arxiv="2405.18377",
        section="section 3",
        note="levels of the layers make the sub-networks; the loss is the divergence from it",
    )
    catalogue = (278,)
    missing = {278: "fine-tuning the model once so that its sub-networks work"}
    examples = ("llama_nas", "llama_nas:generations=1,population=3,tokens=32")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(0, 100_000, self.name, generations=self.generations)
        check_range(2, 1000, self.name, population=self.population)

    @property
    def evaluations(self) -> int:
        """See `Allocator`."""
        return self.population * (self.generations + 1)

    def search(self, problem: Problem, tick: Callable[[int], None]) -> Allocation:
        """See `Allocator`."""
        judge = Judge(problem, tick)
        people = self._first(problem)
        losses = {each: judge.loss(each, self.tokens) for each in people}
        for generation in range(self.generations):
            draws = np.random.default_rng((self.seed, generation))
            children = {
                mutate(problem, _crossed(problem, people, draws), draws)
                for _ in range(self.population)
            }
            for child in sorted(children - losses.keys()):
                losses[child] = judge.loss(child, self.tokens)
            everyone = sorted({*people, *children})
            people = _survivors(problem, everyone, losses, self.population)
        return min(people, key=lambda each: (losses[each], each))

    def _first(self, problem: Problem) -> list[Allocation]:
        """Return where the search starts: estimates, all alike, and mutations of these."""
        people = [problem.uniform(), problem.cheapest(), problem.cheapest(0.5)]
        draws = np.random.default_rng((self.seed, 2**32))
        for number in range(10 * self.population):
            if len(set(people)) >= self.population:
                break
            people.append(mutate(problem, people[number % len(people)], draws))
        return sorted(set(people))


def _crossed(
    problem: Problem, people: Sequence[Allocation], draws: np.random.Generator
) -> Allocation:
    """Return an allocation whose levels are from two parents; the first one where it is too large.

    Parents that stand earlier are more likely.
    """
    places = np.minimum(draws.integers(len(people), size=2), draws.integers(len(people), size=2))
    one, other = (np.array(people[place]) for place in places)
    child = tuple(np.where(draws.random(len(one)) < 0.5, one, other).tolist())
    return child if problem.bytes_of(child) <= problem.budget else tuple(one.tolist())


def _survivors(
    problem: Problem,
    people: Sequence[Allocation],
    losses: dict[Allocation, float],
    count: int,
) -> list[Allocation]:
    """Return so many allocations of the best fronts; the one with the smallest loss stays first."""
    values = np.array([[losses[each], problem.bytes_of(each)] for each in people])
    order: list[int] = []
    left = np.arange(len(people))
    while len(left) and len(order) < count:
        own = values[left]
        no_better = np.all(own[:, None] >= own[None], axis=-1)
        beaten = np.any(no_better & np.any(own[:, None] > own[None], axis=-1), axis=1)
        front = left[~beaten]
        order += front[np.argsort(-_distances(values[front]), kind="stable")].tolist()
        left = left[beaten]
    kept = order[:count]
    kept.sort(key=lambda at: (losses[people[at]], people[at]))
    return [people[at] for at in kept]


def _distances(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how far each of a front [n, 2] is from its neighbours; the ends are infinitely far."""
    distances = np.zeros(len(values))
    for axis in range(2):
        order = np.argsort(values[:, axis], kind="stable")
        ordered = values[order, axis]
        span = max(float(ordered[-1] - ordered[0]), 1e-30)
        distances[order[[0, -1]]] = np.inf
        distances[order[1:-1]] += (ordered[2:] - ordered[:-2]) / span
    return distances
