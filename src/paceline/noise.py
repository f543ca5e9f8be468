"""Gumbel noise that depends on (seed, position, token) alone.

Drawing `argmax(logits + noise)` draws from softmax(logits) (Gumbel-max, e.g. arXiv 1411.0030,
section 2). Because the noise of a position is fixed by the seed, the token drawn there is fixed by
the logits: however the model came to be run at that position, the output is the same. A draft
model may draw with the same noise, which makes agreement likely.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1

# Noise lies in (-3.7, 37.5): a token this far below the best logit can never win.
REACH = 42.0


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _mix_all(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def gumbel(seed: int, position: int, tokens: NDArray[np.integer]) -> NDArray[np.float64]:
    """Standard Gumbel noise for `tokens` [n] at `position`, float64 [n].

    Element `t` is entry t + 1 of the SplitMix64 stream (Steele, Lea and Flood 2014, figure 17)
    that starts at a hash of seed and position.

    Args:
        seed: any integer; taken modulo 2^64.
        position: index, in the whole sequence, of the token that is drawn.
        tokens: token ids.
    """
    start = _mix((_mix((seed + _GOLDEN) & _MASK) + (position + 1) * _GOLDEN) & _MASK)
    steps = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    bits = _mix_all(np.uint64(start) + steps)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    noise: NDArray[np.float64] = -np.log(-np.log(uniform))
    return noise
