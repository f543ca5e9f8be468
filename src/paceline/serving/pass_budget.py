"""Bounds the prompt tokens of a pass, so that no running stream waits for long.

Parts of prompts (Sarathi-Serve, arXiv 2403.02310) and the tokens that draft models and guides must
read before they can be used share one budget: each token counts by the cost of its model.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from paceline.decoding.governor import Governor
from paceline.engines.base import Engine

CHUNK = 256  # prompt tokens of a pass without streams; maximum that a model reads in a pass
_MIN_TOKENS = 8  # prompt tokens of a pass with streams


def prefill_tokens(governor: Governor, streams: int, prefill_slowdown: float) -> int:
    """Return the prompt tokens that a pass may carry next to the running streams.

    Args:
        governor: predicts the time of a pass.
        streams: requests that decode in it.
        prefill_slowdown: maximum time of the pass, relative to one without prompt tokens.
    """
    return fitting_tokens(governor.seconds, streams, prefill_slowdown)


def fitting_tokens(
    seconds: Callable[[NDArray[np.int64]], NDArray[np.float64]],
    streams: int,
    prefill_slowdown: float,
) -> int:
    """Return the same by T(n) alone, which `seconds` returns for each of some sizes."""
    if not streams:
        return CHUNK
    times = seconds(streams + np.arange(CHUNK + 1))
    slow = times[1:] > prefill_slowdown * times[0]
    return max(int(slow.argmax()), _MIN_TOKENS) if slow.any() else CHUNK


def relative_cost(engine: Engine, target: Engine) -> float:
    """Return the cost of a token in tokens of `target`, by the size of their weights."""
    own, other = engine.weight_bytes, target.weight_bytes
    return own / other if own and other else 1.0


class PassBudget:
    """The tokens that draft models and guides may still read in a pass.

    Args:
        tokens: that the pass may carry.
        alone: no other request waits; prompt parts then leave the budget untouched.
    """

    def __init__(self, tokens: int, alone: bool) -> None:
        self._alone, self._left = alone, float(CHUNK if alone else tokens)
        self._promised = _MIN_TOKENS

    def fit_part(self, size: int, extra_cost: float) -> int:
        """Return how many of a prompt part's tokens may run, and charge them.

        Args:
            size: of the part.
            extra_cost: of each token in draft models and guides.
        """
        if self._alone:
            return size
        fitting = max(int(size / (1.0 + extra_cost)), min(size, _MIN_TOKENS))
        self._left -= fitting * (1.0 + extra_cost)
        return fitting

    def allowance(self, cost: float) -> int:
        """Return the number of tokens that may be read at `cost` each."""
        return min(max(int(self._left / cost), 0), CHUNK) if cost else CHUNK

    def min_allowance(self, cost: float) -> int:
        """Return the same as `allowance`, but at least 8 at the first call of a pass.

        So some request always makes progress.
        """
        tokens = max(self.allowance(cost), self._promised)
        self._promised = 0
        return tokens

    def spend(self, tokens: int, cost: float) -> None:
        """Charge `tokens` at `cost` each."""
        self._left -= tokens * cost
