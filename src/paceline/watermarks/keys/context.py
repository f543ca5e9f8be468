"""Random bits keyed by the preceding tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from paceline.noise import stream, streams


def context_stream(seed: int, context: Sequence[int]) -> int:
    """Return the start of the random stream for tokens after `context`; see `noise.bits`."""
    for token in context:
        seed = stream(seed, token)
    return seed


def context_streams(seed: int, contexts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return `context_stream` of contexts [M, H], [M]."""
    starts = np.full(len(contexts), seed, np.uint64)
    for column in contexts.T:
        starts = streams(starts, column)
    return starts


def windows(tokens: Sequence[int], size: int) -> NDArray[np.int64]:
    """Return all n-grams of `size` tokens, int64 [M, size]; none if the text is shorter."""
    ids = np.asarray(tokens, np.int64)
    if len(ids) < size:
        return np.zeros((0, size), np.int64)
    return np.lib.stride_tricks.sliding_window_view(ids, size)
