"""The statistics that reports use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Interval(NamedTuple):
    """A median and the bounds of its confidence interval."""

    median: float
    low: float
    high: float


class Ratio(NamedTuple):
    """A ratio of totals and the bounds of its confidence interval."""

    value: float
    low: float
    high: float


def median_interval(
    values: Sequence[float], seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> Interval:
    """Return the median of `values` with a percentile bootstrap interval (Efron 1979).

    Args:
        values: at least one; each is one independent unit, e.g. the ratio of one prompt.
        seed: of the resampling; the same seed gives the same interval.
        resamples: number of bootstrap samples.
        level: share of them that the interval holds.
    """
    sample = np.asarray(values, np.float64)
    medians = np.median(sample[_resampled_indices(len(sample), seed, resamples)], axis=1)
    return Interval(float(np.median(sample)), *_bounds(medians, level))


def total_ratio(
    upper: Sequence[float],
    lower: Sequence[float],
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> Ratio:
    """Return the sum of `upper` over the sum of `lower`, with a bootstrap interval over pairs.

    Args:
        upper: one number for each unit, e.g. plain decoding's seconds for a prompt.
        lower: the other number of each pair, above 0.
        seed: as in `median_interval`.
        resamples: as in `median_interval`.
        level: as in `median_interval`.
    """
    pairs = np.array([upper, lower], np.float64)
    sums = pairs[:, _resampled_indices(pairs.shape[1], seed, resamples)].sum(2)
    above, below = pairs.sum(1).tolist()
    return Ratio(above / below, *_bounds(sums[0] / sums[1], level))


def _resampled_indices(size: int, seed: int, resamples: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(size, size=(resamples, size))


def _bounds(values: NDArray[np.float64], level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail]).tolist()
    return low, high
