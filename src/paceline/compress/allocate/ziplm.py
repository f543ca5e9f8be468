"""ZipLM: the cheapest levels under a measured budget, by a search over sensitivities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paceline.compress.allocate.base import Allocation, Allocator, Judge, Problem
from paceline.core import Exactness
from paceline.registry import Source, allocators, check_range

_BINS = 2000  # of the budget


@allocators.register("ziplm", Exactness.LOSSY)
@dataclass(frozen=True)
class ZipLM(Allocator):
    """Solve for the smallest sum of estimated losses, and search the weights of the units in it.

    The sum of the estimates of all units is minimised under the budget by dynamic programming;
    with `--budget tokens/s=...` the budget is a time, from a table that was measured on this
    machine. Estimates are then multiplied by random factors, a tenth of which change at a time, and
    the allocation with the smallest loss of the whole model counts.

    Attributes:
        trials: factors that are tried, 0 to 100000. Default 60.
        share: of the units whose factor changes in a trial, 0.001 to 1. Default 0.1.
        tokens: that an allocation is judged on, 16 to 1000000. Default 2048.
        seed: of the factors. Default 0.
    """

    trials: int = 60
    share: float = 0.1
    tokens: int = 2048
    seed: int = 0

    source = Source(
        authors="Kurtic et al.",
        title="ZipLM: Inference-Aware Structured Pruning of Language Models",
        arxiv="2302.04089",
        section="section 3.2",
        note="levels of several widths and bits instead of every possible width",
    )
    catalogue = (253,)
    missing = {253: "gradual pruning with layer-wise distillation between the steps"}
    examples = ("ziplm", "ziplm:trials=4,tokens=64")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(0, 100_000, self.name, trials=self.trials)
        check_range(0.001, 1.0, self.name, share=self.share)

    @property
    def evaluations(self) -> int:
        """See `Allocator`."""
        return 2 + self.trials

    def search(self, problem: Problem, tick: Callable[[int], None]) -> Allocation:
        """See `Allocator`."""
        judge = Judge(problem, tick)
        factors = np.ones(problem.matrices)
        best = judge.best([problem.uniform(), _solve(problem, factors)], self.tokens)
        for trial in range(self.trials):
            draws = np.random.default_rng((self.seed, trial))
            changed = draws.random(problem.matrices) < self.share
            tried = np.where(changed, draws.lognormal(0.0, 1.0, problem.matrices), factors)
            found = _solve(problem, tried)
            if found != best and judge.best([best, found], self.tokens) == found:
                best, factors = found, tried
        return best


def _solve(problem: Problem, factors: NDArray[np.float64]) -> Allocation:
    """Return the levels with the smallest sum of factors times prices that fit the budget.

    Sizes are rounded up to bins of the budget, so that what is found fits.
    """
    lowest = problem.sizes[:, 0]
    room = problem.budget - int(lowest.sum())
    if room <= 0:
        return problem.uniform()
    best = np.zeros(_BINS + 1)
    chosen = np.zeros((problem.matrices, _BINS + 1), np.int64)
    for at, end in enumerate(problem.highest):
        costs = np.full(_BINS + 1, np.inf)
        for level in range(end + 1):
            extra = int(problem.sizes[at, level] - lowest[at])
            bins = -(-extra * _BINS // room)
            if bins > _BINS:
                break
            price = factors[at] * problem.prices[at, level]
            total = np.full(_BINS + 1, np.inf)
            total[bins:] = best[: _BINS + 1 - bins] + price
            better = total < costs
            costs[better] = total[better]
            chosen[at, better] = level
        best = costs
    levels = _trace(problem, chosen, room)
    return problem.filled(levels, problem.prices * factors[:, None])  # what rounding left over


def _trace(problem: Problem, chosen: NDArray[np.int64], room: int) -> Allocation:
    """Return the levels of the solution that has all bins, from the last unit on backwards."""
    left, levels = _BINS, [0] * problem.matrices
    for at in reversed(range(problem.matrices)):
        levels[at] = int(chosen[at, left])
        extra = int(problem.sizes[at, levels[at]] - problem.sizes[at, 0])
        left -= -(-extra * _BINS // room)
    return tuple(levels)
