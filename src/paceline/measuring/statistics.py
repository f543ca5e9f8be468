"""The few statistics that reports use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A median and the bounds of its confidence interval."""

    median: float
    low: float
    high: float


def median_interval(
    values: Sequence[float], seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> Interval:
    """Median of `values` with a percentile bootstrap interval (Efron 1979).

    Args:
        values: at least one; each is one independent unit, e.g. the ratio of one prompt.
        seed: of the resampling; the same seed gives the same interval.
        resamples: bootstrap samples.
        level: share of them that the interval holds.
    """
    sample = np.asarray(values, np.float64)
    picks = np.random.default_rng(seed).integers(len(sample), size=(resamples, len(sample)))
    medians = np.median(sample[picks], axis=1)
    tail = (1 - level) / 2
    low, high = np.quantile(medians, [tail, 1 - tail])
    return Interval(float(np.median(sample)), float(low), float(high))
