"""Search for the scales and minima of quantised blocks that minimise a weighted squared error.

Values and error weights are [k, G]: k values of a group along the first axis, G groups along the
second, so that every sum over a group adds whole rows. A group has a scale and perhaps a minimum;
S groups form a super-block, whose one or two half-precision factors multiply small integers.

Each search starts from a grid of scales with the least-squares solution for each, as llama.cpp's
quantisers do, and then alternates between codes, integers and factors; a step counts only where it
lowers the error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats

Doubles = NDArray[np.float64]
Nearest = Callable[[Floats], Floats]  # values in units of the scale -> the levels closest to them


def divide(numerator: Any, denominator: Any) -> Doubles:
    """Return the quotient in double precision, 0 where the denominator is 0 or absurdly small."""
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    safe = np.abs(denominator) > 1e-300
    quotient: Doubles = np.zeros(np.broadcast(numerator, denominator).shape)
    np.divide(numerator, denominator, out=quotient, where=safe)
    return quotient


def to_half(values: Any) -> Floats:
    """Round to half precision and return float32; what is too large becomes infinite."""
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(np.float16).astype(np.float32)


def _group_sum(left: Floats, right: Floats) -> Doubles:
    """Sum the products over each group: [k, G], [k, G] -> [G]."""
    total: Doubles = np.einsum("kg,kg->g", left, right).astype(np.float64)
    return total


def search_scale(x: Floats, w: Floats, nearest: Nearest, targets: Floats) -> Doubles:
    """Return the best scale of every group, [G], for values that are scale * level.

    Args:
        x: values, [k, G].
        w: weights of their squared errors, [k, G].
        nearest: rounds to the levels.
        targets: the levels to which the value of largest magnitude is mapped in turn.
    """
    peak = np.take_along_axis(x, np.abs(x).argmax(0)[None], 0)[0]
    inverse = divide(1, peak)
    wx = w * x
    best, scale = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for target in targets:
        levels = nearest(x * (inverse * target).astype(np.float32))
        xl, ll = _group_sum(wx, levels), _group_sum(w * levels, levels)
        gain = xl * xl / ll  # no number where all levels are 0, and then not better
        better = gain > best
        best = np.where(better, gain, best)
        scale = np.where(better, xl / ll, scale)
    return scale


def search_affine(
    x: Floats, w: Floats, top: int, steps: Floats, any_minimum: bool = False
) -> tuple[Doubles, Doubles]:
    """Return the best scale and minimum of every group, both [G], for scale * code + minimum.

    Args:
        x: values, [k, G].
        w: weights of their squared errors, [k, G].
        top: codes are 0 to `top`.
        steps: number of codes that the range of values spans, one trial each.
        any_minimum: the minimum may be positive; otherwise it is at most 0.
    """
    low = x.min(0) if any_minimum else np.minimum(x.min(0), 0)
    span = x.max(0) - low
    above, wx, inverse = x - low, w * x, divide(1, span).astype(np.float32)
    sum_w, sum_x = w.sum(0).astype(np.float64), wx.sum(0).astype(np.float64)
    scale, minimum = divide(span, top), low.astype(np.float64)
    best = np.full(x.shape[1], np.inf)
    for step in steps:
        codes = above * (inverse * np.float32(step))
        np.clip(np.rint(codes, out=codes), 0, top, out=codes)
        weighted = w * codes
        ll, sum_l = _group_sum(weighted, codes), weighted.sum(0).astype(np.float64)
        xl = _group_sum(wx, codes)
        determinant = sum_w * ll - sum_l * sum_l
        s = (sum_w * xl - sum_x * sum_l) / determinant
        m = (ll * sum_x - sum_l * xl) / determinant
        if not any_minimum:
            s, m = np.where(m > 0, xl / ll, s), np.minimum(m, 0)
        error = s * s * ll + m * m * sum_w + 2 * s * m * sum_l - 2 * s * xl - 2 * m * sum_x
        better = (error < best) & (determinant > 0)
        best = np.where(better, error, best)
        scale, minimum = np.where(better, s, scale), np.where(better, m, minimum)
    return scale, minimum


def _per_block(values: Doubles, groups: int) -> Doubles:
    """Sum the groups of each super-block: [n * S] -> [n]."""
    total: Doubles = values.reshape(-1, groups).sum(1)
    return total


def _start(factor: Floats) -> Doubles:
    """Return the errors to begin with, [n]: nothing replaces a factor that half cannot hold."""
    return np.where(np.isfinite(factor), np.inf, -np.inf)


def _keep_better(
    error: Doubles, best: Doubles, new: tuple[Any, ...], old: tuple[Any, ...]
) -> tuple[Doubles, tuple[Any, ...]]:
    """Return, block by block, the state of smaller error; arrays of it are [n] or [n, S]."""
    better = error < best
    kept = tuple(
        np.where(better if a.ndim == 1 else better[:, None], a, b)
        for a, b in zip(new, old, strict=True)
    )
    return np.where(better, error, best), kept


def fit_scales(
    x: Floats,
    w: Floats,
    scales: Doubles,
    nearest: Nearest,
    limits: tuple[int, int],
    rounds: int = 4,
) -> tuple[Floats, Floats, Floats]:
    """Express scales as factor * integer, for values that are factor * integer * level.

    Args:
        x: values of n super-blocks of S groups, [k, n * S].
        w: weights of their squared errors, [k, n * S].
        scales: of the groups, [n, S].
        nearest: rounds to the levels.
        limits: smallest and largest integer; the smallest has the larger magnitude.
        rounds: of improvement.

    Returns:
        factors [n], rounded to half precision; integers [n, S]; levels [k, n * S].
    """
    groups = scales.shape[1]
    wx = w * x
    peak = np.take_along_axis(scales, np.abs(scales).argmax(1)[:, None], 1)[:, 0]
    factor = to_half(peak / limits[0])
    integers = _integers(divide(scales, factor[:, None]), limits)
    best, kept = _start(factor), (factor, integers)
    for _ in range(rounds + 1):
        scale = (factor[:, None] * integers).reshape(-1)
        levels = nearest(x * divide(1, scale).astype(np.float32))
        rest = scale * levels - x
        error = _per_block(_group_sum(w * rest, rest), groups)
        best, kept = _keep_better(error, best, (factor, integers), kept)
        xl, ll = _group_sum(wx, levels), _group_sum(w * levels, levels)
        integers = _integers(divide(xl, ll * np.repeat(factor, groups)).reshape(-1, groups), limits)
        flat = integers.reshape(-1)
        factor = to_half(
            divide(_per_block(flat * xl, groups), _per_block(flat * flat * ll, groups))
        )
    factor, integers = kept
    scale = (factor[:, None] * integers).reshape(-1)
    return factor, integers, nearest(x * divide(1, scale).astype(np.float32))


def _integers(values: Doubles, limits: tuple[int, int]) -> Floats:
    return np.clip(np.rint(values), *limits).astype(np.float32)


def fit_affine(
    x: Floats,
    w: Floats,
    scales: Doubles,
    minima: Doubles,
    top: int,
    limit: int,
    rounds: int = 4,
) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """Express scales and minima as factors * integers: factor * i * code - offset * j.

    Args:
        x: values of n super-blocks of S groups, [k, n * S].
        w: weights of their squared errors, [k, n * S].
        scales: of the groups, [n, S].
        minima: of the groups, [n, S].
        top: codes are 0 to `top`.
        limit: integers are 0 to `limit`.
        rounds: of improvement.

    Returns:
        factors and offsets, [n], rounded to half precision; the integers of scales and of minima,
        [n, S]; codes [k, n * S].
    """
    groups = scales.shape[1]
    bounds = (0, limit)
    sums = _Moments(x, w)
    factor, offset = to_half(scales.max(1) / limit), to_half(-minima.min(1) / limit)
    i = _integers(divide(scales, factor[:, None]), bounds)
    j = _integers(divide(-minima, offset[:, None]), bounds)
    best, kept = _start(factor + offset), (factor, offset, i, j)
    for _ in range(rounds + 1):
        codes = _affine_codes(x, factor, offset, i, j, top)
        scale, shift = (factor[:, None] * i).reshape(-1), (offset[:, None] * j).reshape(-1)
        rest = scale * codes - shift - x
        error = _per_block(_group_sum(w * rest, rest), groups)
        best, kept = _keep_better(error, best, (factor, offset, i, j), kept)
        sums.update(codes)
        own = sums.integers(np.repeat(factor, groups), np.repeat(offset, groups), limit)
        factor, offset = sums.factors(*own, groups)
        i, j = (each.reshape(-1, groups).astype(np.float32) for each in own)
    factor, offset, i, j = kept
    return factor, offset, i, j, _affine_codes(x, factor, offset, i, j, top)


def _affine_codes(
    x: Floats, factor: Floats, offset: Floats, i: Floats, j: Floats, top: int
) -> Floats:
    scale, shift = (factor[:, None] * i).reshape(-1), (offset[:, None] * j).reshape(-1)
    codes = x + shift
    codes *= divide(1, scale).astype(np.float32)
    clipped: Floats = np.clip(np.rint(codes, out=codes), 0, top, out=codes)
    return clipped


class _Moments:
    """Weighted sums of values and codes of every group, [G], and what minimises the error.

    With scale a and shift b the error of a group is, but for a constant,
    a^2 ll + b^2 ww - 2ab l - 2a xl + 2b xx.
    """

    def __init__(self, x: Floats, w: Floats) -> None:
        self._w, self._wx = w, w * x
        self._ww = w.sum(0).astype(np.float64)
        self._xx = self._wx.sum(0).astype(np.float64)

    def update(self, codes: Floats) -> None:
        """Take the sums over new codes, [k, G]."""
        weighted = self._w * codes
        self._ll = _group_sum(weighted, codes)
        self._l = weighted.sum(0).astype(np.float64)
        self._xl = _group_sum(self._wx, codes)

    def integers(self, factor: Floats, offset: Floats, limit: int) -> tuple[Doubles, Doubles]:
        """Return the best pair of integers of each group, [G]: three scales, one shift for each."""
        determinant = self._ww * self._ll - self._l**2
        scale = divide(self._ww * self._xl - self._xx * self._l, determinant)
        centre = np.rint(divide(scale, factor))
        best = np.full(len(centre), np.inf)
        best_i, best_j = centre, centre
        for delta in (0, -1, 1):
            i = np.clip(centre + delta, 0, limit)
            a = factor * i
            shift = divide(a * self._l - self._xx, self._ww)
            j = np.clip(np.rint(divide(shift, offset)), 0, limit)
            b = offset * j
            error = a * a * self._ll + b * b * self._ww - 2 * a * b * self._l
            error += 2 * (b * self._xx - a * self._xl)
            better = error < best
            best = np.where(better, error, best)
            best_i, best_j = np.where(better, i, best_i), np.where(better, j, best_j)
        return best_i, best_j

    def factors(self, i: Doubles, j: Doubles, groups: int) -> tuple[Floats, Floats]:
        """Return the factor and the offset of each super-block by least squares, [n]."""
        aa, bb = _per_block(i * i * self._ll, groups), _per_block(j * j * self._ww, groups)
        ab = _per_block(i * j * self._l, groups)
        ax, bx = _per_block(i * self._xl, groups), _per_block(j * self._xx, groups)
        determinant = aa * bb - ab * ab
        joint = determinant > 1e-9 * aa * bb
        factor = np.where(joint, divide(ax * bb - ab * bx, determinant), divide(ax, aa))
        offset = np.where(joint, divide(ab * ax - aa * bx, determinant), 0)
        return to_half(factor), to_half(offset)
