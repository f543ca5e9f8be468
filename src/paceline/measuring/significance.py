"""Tests of whether two models differ on the same items."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, lgamma, log, log1p, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

_EXACT = 14  # differences up to which all signs are enumerated
_BLOCK = 1 << 22  # random signs drawn at once
_TINY = 1e-300


class Estimate(NamedTuple):
    """A mean and its standard error; the error of a single value is None."""

    value: float
    error: float | None


def mean_estimate(values: ArrayLike) -> Estimate:
    """Return the mean of `values` [n] with its standard error s / sqrt(n)."""
    sample = np.asarray(values, np.float64)
    if len(sample) < 2:
        return Estimate(float(sample.mean()), None)
    return Estimate(float(sample.mean()), float(sample.std(ddof=1) / sqrt(len(sample))))


def share_estimate(hits: ArrayLike) -> Estimate:
    """Return the share of ones in `hits` [n] with its binomial error sqrt(p (1 - p) / n)."""
    sample = np.asarray(hits, np.float64)
    share = float(sample.mean())
    return Estimate(share, sqrt(share * (1 - share) / len(sample)))


def ratio_estimate(upper: ArrayLike, lower: ArrayLike) -> Estimate:
    """Return sum(upper) / sum(lower) with its linearised error over the pairs [n].

    The error is that of the mean of (upper - ratio * lower) / mean(lower) (Cochran 1977, eq. 6.4).
    """
    above, below = np.asarray(upper, np.float64), np.asarray(lower, np.float64)
    ratio = float(above.sum() / below.sum())
    rest = (above - ratio * below) / below.mean()
    return Estimate(ratio, mean_estimate(rest).error)


def t_test(differences: ArrayLike) -> float | None:
    """Return the two-sided p value of Student's test that the mean difference is 0.

    None for fewer than two differences, and where all are the same and not 0.
    """
    sample = np.asarray(differences, np.float64)
    mean, error = mean_estimate(sample)
    if not sample.any():
        return 1.0 if len(sample) else None
    if not error:
        return None
    freedom = len(sample) - 1
    t = mean / error
    return _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))


def sign_flip_test(differences: ArrayLike, seed: int = 0, resamples: int = 9999) -> float:
    """Return the two-sided p value of the permutation test that flips signs of differences.

    All signs are enumerated for up to 14 differences other than 0; otherwise `resamples` random
    ones are drawn, and the p value is (1 + extreme) / (1 + resamples), which is never 0.

    Args:
        differences: of pairs, [n].
        seed: of the random signs.
        resamples: their number.
    """
    sample = np.asarray(differences, np.float64)
    sample = sample[sample != 0]
    count = len(sample)
    if not count:
        return 1.0
    observed = abs(float(sample.sum())) * (1 - 1e-12)  # sums in another order are equal
    if count <= _EXACT:
        codes = np.arange(1 << count)[:, None] >> np.arange(count) & 1
        return float((np.abs(_flipped_sums(codes, sample)) >= observed).mean())
    rng = np.random.default_rng(seed)
    extreme = drawn = 0
    while drawn < resamples:
        rows = min(resamples - drawn, max(1, _BLOCK // count))
        raw = np.frombuffer(rng.bytes(rows * -(-count // 8)), np.uint8).reshape(rows, -1)
        signs = np.unpackbits(raw, axis=1, count=count)
        extreme += int((np.abs(_flipped_sums(signs, sample)) >= observed).sum())
        drawn += rows
    return (1 + extreme) / (1 + resamples)


def _flipped_sums(kept: NDArray[np.generic], sample: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sums of `sample` [n] with the sign of each turned where `kept` [m, n] is 0."""
    sums: NDArray[np.float64] = 2 * (kept.astype(np.float32) @ sample) - sample.sum()
    return sums


def mcnemar_test(won: int, lost: int) -> float:
    """Return the exact two-sided p value of McNemar's test.

    Args:
        won: items that only the first of two models has right.
        lost: items that only the second has right.
    """
    count, fewer = won + lost, min(won, lost)
    logs = [_log_choose(count, k) - count * log(2) for k in range(fewer + 1)]
    return min(1.0, 2 * sum(map(exp, logs)))


def wins(ours: Sequence[float], base: Sequence[float]) -> tuple[int, int]:
    """Return how many items only the first, and only the second, of two models has right."""
    pairs = list(zip(ours, base, strict=True))
    return sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)


def _log_choose(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b).

    By its continued fraction (Abramowitz and Stegun 26.5.8), evaluated with Lentz's method.
    """
    if x <= 0 or x >= 1:
        return min(max(x, 0.0), 1.0)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = exp(a * log(x) + b * log1p(-x) + lgamma(a + b) - lgamma(a) - lgamma(b)) / a
    c, d = 1.0, 1 / (_away(1 - (a + b) * x / (a + 1)))
    value = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / _away(1 + term * d)
            c = _away(1 + term / c)
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return min(1.0, front * value)


def _away(value: float) -> float:
    """Return a value, kept away from 0."""
    return value if abs(value) > _TINY else _TINY
