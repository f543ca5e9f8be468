"""Gumbel noise that depends on (seed, position, token) alone.

Drawing `argmax(logits + noise)` draws from softmax(logits) (Gumbel-max, e.g. arXiv 1411.0030,
section 2). The seed fixes the noise of every position, so the logits alone decide the token drawn
there, however the model came to be run at that position. A draft model may draw with the same
noise, which makes agreement likely.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from paceline.core import Request

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1

# Noise lies in (-3.7, 37.5), so a token this far below the largest logit is never drawn.
REACH = 42.0


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _mix_all(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def stream(seed: int, position: int) -> int:
    """Return the start of the noise stream of `position`: a hash of it and the seed."""
    return _mix((_mix((seed + _GOLDEN) & _MASK) + (position + 1) * _GOLDEN) & _MASK)


def streams(seeds: NDArray[np.uint64], positions: NDArray[np.integer]) -> NDArray[np.uint64]:
    """Return `stream` of arrays that broadcast."""
    steps = (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    return _mix_all(_mix_all(seeds + np.uint64(_GOLDEN)) + steps)


def bits(start: int | NDArray[np.uint64], tokens: NDArray[np.integer]) -> NDArray[np.uint64]:
    """Return 64 random bits for each of `tokens`, which broadcast with the streams' starts.

    Element `t` is entry t + 1 of the SplitMix64 stream (Steele, Lea and Flood 2014, figure 17)
    that begins at `start`.
    """
    steps = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    return _mix_all(np.asarray(start, np.uint64) + steps)


def uniform(start: int | NDArray[np.uint64], tokens: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return uniform numbers in (0, 1) for `tokens`, float64; see `bits`."""
    return ((bits(start, tokens) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def perturbation(start: int, tokens: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return standard Gumbel noise of the stream at `start` for `tokens` [n], float64 [n]."""
    noise: NDArray[np.float64] = -np.log(-np.log(uniform(start, tokens)))
    return noise


def gumbel(seed: int, position: int, tokens: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return standard Gumbel noise for `tokens` [n] at `position`, float64 [n]: see `stream`.

    Args:
        seed: any integer; taken modulo 2^64.
        position: index, in the whole sequence, of the token that is drawn.
        tokens: token ids.
    """
    return perturbation(stream(seed, position), tokens)


def noise_of(request: Request, position: int) -> int | None:
    """Return the start of the noise stream of a draw at `position`; None for a draw without noise.

    Without noise the largest edited logit is drawn. A watermark's `Request.noise` replaces the
    noise of the seed.
    """
    if request.temperature == 0:
        return None
    if request.noise is not None:
        return request.noise(position)
    return stream(request.seed, position)
