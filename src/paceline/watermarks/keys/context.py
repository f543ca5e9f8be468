"""What watermarks by the tokens before share: random bits keyed by a context."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from paceline.noise import stream, streams


def context_stream(seed: int, context: Sequence[int]) -> int:
    """Where the random bits of the tokens after `context` start; see `noise.bits`."""
    for token in context:
        seed = stream(seed, token)
    return seed


def context_streams(seed: int, contexts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """`context_stream` of contexts [M, H]: [M]."""
    starts = np.full(len(contexts), seed, np.uint64)
    for column in contexts.T:
        starts = streams(starts, column)
    return starts


def windows(tokens: Sequence[int], size: int) -> NDArray[np.int64]:
    """Every run of `size` tokens, int64 [M, size]; none where the text is shorter."""
    ids = np.asarray(tokens, np.int64)
    if len(ids) < size:
        return np.zeros((0, size), np.int64)
    return np.lib.stride_tricks.sliding_window_view(ids, size)
