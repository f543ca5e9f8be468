"""The contract of an allocator: which level each unit takes, so that all fit into a budget.

Units are matrices, or the attention and the MLP of each layer; what a budget counts are bytes, or
nanoseconds of a pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from paceline.abilities import Ability
from paceline.errors import RequestError
from paceline.registry import Method, check_range

Allocation = tuple[int, ...]  # a level for each unit
Bytes = NDArray[np.int64]  # [units, levels]


@dataclass(frozen=True)
class Problem:
    """What an allocator is asked for.

    Attributes:
        sizes: bytes (or nanoseconds) of each unit at each level, int64 [units, levels]; every level
            takes more than the one before it.
        prices: estimates of what each level of each unit adds to the loss, float64
            [units, levels]; only their ratios count.
        budget: for all units together.
        loss: returns what a model with an allocation loses on so many tokens, at least, of the
            texts of the search.
        ends: the highest level of each unit, where they differ; entries of `sizes` and `prices`
            behind it mean nothing.
        trained_loss: returns what a model loses after a short training on so many tokens, judged on
            as many others; None where that cannot be done.
    """

    sizes: Bytes
    prices: NDArray[np.float64]
    budget: int
    loss: Callable[[Allocation, int], float]
    ends: Allocation | None = None
    trained_loss: Callable[[Allocation, int], float] | None = None

    @property
    def matrices(self) -> int:
        """Number of units."""
        return len(self.sizes)

    @property
    def highest(self) -> Allocation:
        """The highest level of each unit."""
        return self.ends or (self.levels - 1,) * self.matrices

    @property
    def levels(self) -> int:
        """The largest number of levels of a unit."""
        return int(self.sizes.shape[1])

    def bytes_of(self, allocation: Allocation) -> int:
        """Return what all units take."""
        return int(self.sizes[np.arange(self.matrices), list(allocation)].sum())

    def uniform(self) -> Allocation:
        """Return the highest level that fits for all units alike.

        Where units have levels of their own it is for each the highest one up to the same share of
        what the unit takes at its highest.

        Raises:
            RequestError: not even the lowest does.
        """
        if self.ends is not None:
            return self._same_shares()
        fitting = [each for each in range(self.levels) if self.sizes[:, each].sum() <= self.budget]
        if not fitting:
            raise RequestError(
                f"the smallest level of all matrices takes {int(self.sizes[:, 0].sum())} bytes, "
                f"and the budget leaves {self.budget} for them; raise --budget, or name a recipe "
                "with smaller levels"
            )
        return (fitting[-1],) * self.matrices

    def _same_shares(self) -> Allocation:
        tops = self.sizes[np.arange(self.matrices), list(self.highest)]
        shares = self.sizes / tops[:, None]
        rows = [row[: end + 1] for row, end in zip(shares, self.highest, strict=True)]
        chosen: Allocation | None = None
        for bound in np.unique(np.concatenate(rows)):
            trial = tuple(max(int((row <= bound).sum()) - 1, 0) for row in rows)
            if self.bytes_of(trial) <= self.budget:
                chosen = trial
        if chosen is None:
            raise RequestError(
                "the smallest levels of all layers do not fit the budget; ask for less with "
                "--budget, or name more levels (narrow, attention_drop, layer_drop, fewer bits)"
            )
        return chosen

    def cheapest(self, spread: float = 1.0) -> Allocation:
        """Return an allocation that fits with a small sum of estimated prices.

        Steps up are taken in the order of what they save for a byte, from the lowest level of
        every matrix, as long as they fit.

        Args:
            spread: power of the prices, 0 to 1: a smaller one lets matrices differ less.
        """
        return self.filled((0,) * self.matrices, _falling(self.prices) ** spread)

    def filled(self, start: Allocation, prices: NDArray[np.float64]) -> Allocation:
        """Return an allocation with more steps up, those that save most for a byte, while they fit.

        Args:
            start: that fits the budget.
            prices: as `prices`.
        """
        chosen = list(start)
        left = self.budget - self.bytes_of(start)
        highest = self.highest
        while True:
            steps = [
                (-(prices[at, level] - prices[at, level + 1]) / self.growth(at, level), at)
                for at, level in enumerate(chosen)
                if level < highest[at] and self.growth(at, level) <= left
            ]
            if not steps:
                return tuple(chosen)
            _, at = min(steps)
            left -= self.growth(at, chosen[at])
            chosen[at] += 1

    def growth(self, at: int, level: int) -> int:
        """Return how much more a unit takes one level up."""
        return int(self.sizes[at, level + 1] - self.sizes[at, level])


def _falling(prices: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return prices of which none is above that of a smaller level."""
    falling: NDArray[np.float64] = np.minimum.accumulate(np.maximum(prices, 0.0), axis=1)
    return falling


class Allocator(Method, ABC):
    """A method that searches for the allocation with the smallest loss under a budget.

    The same settings and the same problem give the same calls of `Problem.loss` in the same order,
    so that an interrupted search whose losses were kept goes on where it was.

    Attributes:
        tokens: that an allocation is judged on, 16 to 1000000.
        seed: of what is drawn.
    """

    tokens: int
    seed: int
    needs: ClassVar[frozenset[Ability]] = frozenset({Ability.TORCH})

    def __post_init__(self) -> None:
        """Check the settings that all searches have."""
        check_range(16, 1_000_000, self.name, tokens=self.tokens)
        check_range(0, 2**63 - 1, self.name, seed=self.seed)

    @abstractmethod
    def search(self, problem: Problem, tick: Callable[[int], None]) -> Allocation:
        """Return an allocation that fits the budget.

        Args:
            problem: with at least one allocation that fits.
            tick: called with the number of evaluations that have been made.
        """

    @property
    def max_tokens(self) -> int:
        """The most tokens that a search asks `Problem.loss` for."""
        return self.tokens

    @property
    @abstractmethod
    def evaluations(self) -> int:
        """About how many calls of `Problem.loss` a search takes, for progress."""


@dataclass
class Judge:
    """Ranks allocations by their losses; of equal ones the first counts.

    Attributes:
        problem: whose loss counts.
        tick: called with the number of evaluations that have been made.
        measure: in place of `Problem.loss`.
    """

    problem: Problem
    tick: Callable[[int], None]
    measure: Callable[[Allocation, int], float] | None = None

    def loss(self, allocation: Allocation, tokens: int) -> float:
        """Return the loss of an allocation."""
        loss = (self.measure or self.problem.loss)(allocation, tokens)
        self.tick(1)
        return loss

    def ranked(self, allocations: list[Allocation], tokens: int) -> list[Allocation]:
        """Return allocations in the order of their losses, the smallest first."""
        losses = [self.loss(each, tokens) for each in allocations]
        return [allocations[at] for at in np.argsort(losses, kind="stable")]

    def best(self, allocations: list[Allocation], tokens: int) -> Allocation:
        """Return the allocation with the smallest loss."""
        return self.ranked(allocations, tokens)[0]


def mutate(problem: Problem, parent: Allocation, draws: np.random.Generator) -> Allocation:
    """Return an allocation some of whose levels differ, and that fits the budget.

    One to three matrices go a level up; others go down until all fit; what is left over lets others
    go up again.
    """
    chosen = np.array(parent)
    rows, highest = np.arange(problem.matrices), np.array(problem.highest)
    up = draws.permutation(np.flatnonzero(chosen < highest))
    for at in up[: min(draws.integers(1, 4), draws.integers(1, 4))]:
        chosen[at] += 1
    raised = chosen > np.array(parent)
    while problem.sizes[rows, chosen].sum() > problem.budget:
        lower = np.flatnonzero((chosen > 0) & ~raised)
        if not len(lower):  # all others are at their lowest
            lower = np.flatnonzero(chosen > 0)
        chosen[draws.choice(lower)] -= 1
    for at in draws.permutation(problem.matrices):
        left = problem.budget - problem.sizes[rows, chosen].sum()
        level = chosen[at] + 1
        fits = level <= highest[at] and problem.growth(at, level - 1) <= left
        if fits and level <= parent[at] + 1:
            chosen[at] = level
    return tuple(chosen.tolist())
