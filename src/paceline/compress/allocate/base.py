"""The contract of an allocator: which level each matrix takes, so that all fit into a budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from paceline.abilities import Ability
from paceline.errors import RequestError
from paceline.registry import Method

Allocation = tuple[int, ...]  # a level for each matrix
Bytes = NDArray[np.int64]  # [matrices, levels]


@dataclass(frozen=True)
class Problem:
    """What an allocator is asked for.

    Attributes:
        sizes: bytes of each matrix at each level, int64 [matrices, levels]; every level takes more
            than the one before it.
        prices: estimates of what each level of each matrix adds to the loss, float64
            [matrices, levels]; only their ratios count.
        budget: bytes for all matrices together.
        loss: returns what a model with an allocation loses on so many tokens, at least, of the
            texts of the search.
    """

    sizes: Bytes
    prices: NDArray[np.float64]
    budget: int
    loss: Callable[[Allocation, int], float]

    @property
    def matrices(self) -> int:
        """Number of matrices."""
        return len(self.sizes)

    @property
    def levels(self) -> int:
        """Number of levels."""
        return int(self.sizes.shape[1])

    def bytes_of(self, allocation: Allocation) -> int:
        """Return the bytes of all matrices."""
        return int(self.sizes[np.arange(self.matrices), list(allocation)].sum())

    def uniform(self) -> Allocation:
        """Return the highest level that fits for all matrices alike.

        Raises:
            RequestError: not even the lowest does.
        """
        fitting = [each for each in range(self.levels) if self.sizes[:, each].sum() <= self.budget]
        if not fitting:
            raise RequestError(
                f"the smallest level of all matrices takes {int(self.sizes[:, 0].sum())} bytes, "
                f"and the budget leaves {self.budget} for them; raise --budget, or name a recipe "
                "with smaller levels"
            )
        return (fitting[-1],) * self.matrices

    def cheapest(self, spread: float = 1.0) -> Allocation:
        """Return an allocation that fits with a small sum of estimated prices.

        Steps up are taken in the order of what they save for a byte, from the lowest level of
        every matrix, as long as they fit.

        Args:
            spread: power of the prices, 0 to 1: a smaller one lets matrices differ less.
        """
        chosen = [0] * self.matrices
        left = self.budget - self.bytes_of(tuple(chosen))
        prices = _falling(self.prices) ** spread
        while True:
            steps = [
                (-(prices[at, level] - prices[at, level + 1]) / self.growth(at, level), at)
                for at, level in enumerate(chosen)
                if level + 1 < self.levels and self.growth(at, level) <= left
            ]
            if not steps:
                return tuple(chosen)
            _, at = min(steps)
            left -= self.growth(at, chosen[at])
            chosen[at] += 1

    def growth(self, at: int, level: int) -> int:
        """Return how many bytes more a matrix takes one level up."""
        return int(self.sizes[at, level + 1] - self.sizes[at, level])


def _falling(prices: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return prices of which none is above that of a smaller level."""
    falling: NDArray[np.float64] = np.minimum.accumulate(np.maximum(prices, 0.0), axis=1)
    return falling


class Allocator(Method, ABC):
    """A method that searches for the allocation with the smallest loss under a budget.

    The same settings and the same problem give the same calls of `Problem.loss` in the same order,
    so that an interrupted search whose losses were kept goes on where it was.
    """

    needs: ClassVar[frozenset[Ability]] = frozenset({Ability.TORCH})

    @abstractmethod
    def search(self, problem: Problem, tick: Callable[[int], None]) -> Allocation:
        """Return an allocation that fits the budget.

        Args:
            problem: with at least one allocation that fits.
            tick: called with the number of evaluations that have been made.
        """

    @property
    @abstractmethod
    def max_tokens(self) -> int:
        """The most tokens that a search asks `Problem.loss` for."""

    @property
    @abstractmethod
    def evaluations(self) -> int:
        """About how many calls of `Problem.loss` a search takes, for progress."""
