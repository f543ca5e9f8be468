"""Where a text runs along a key sequence, and how surprising that is under another key."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats

Seeds = NDArray[np.uint64]
_CELLS = 1 << 13  # floats of a row that are worked on at once: within a small cache
_ENOUGH = 10  # keys as good as the true one; more would not make a poor p much clearer


def best_alignment(rows: Floats, order: NDArray[np.integer], gap: float) -> Floats:
    """The best local alignment of a text with circular key sequences, [B].

    Smith and Waterman (1981) over the costs of Kuditipudi et al. (arXiv 2307.15593, definition 5):
    a token stands beside an element of the key and earns its score, or stands alone for `gap`; an
    element alone costs `gap`, too, at most two of them in a row.

    Args:
        rows: [D, B, L], what each distinct token earns beside each element of B keys. Negative on
            average, so that a text that knows nothing of the key aligns in short pieces only.
        order: [M], the text as indices of `rows`.
        gap: at least 0.
    """
    best = np.zeros(rows.shape[1:], np.float32)
    most = np.zeros(len(best), np.float32)
    for index in order:
        near = np.roll(best, 1, axis=1)
        skips = np.maximum(np.roll(near, 1, axis=1), np.roll(near, 2, axis=1) - gap) - gap
        best = np.maximum(np.maximum(near, skips) + rows[index], best - gap)
        np.maximum(best, 0.0, out=best)
        np.maximum(most, best.max(1), out=most)
    return most


def resampled(
    score: Callable[[Seeds], Floats], seed: int, length: int, resamples: int
) -> tuple[float, float]:
    """A score and its p-value by random keys, exact for every text.

    (1 + keys as good) / (1 + keys tried); once ten keys are as good it is ten / keys tried
    (Besag and Clifford, Sequential Monte Carlo p-values, 1991), so that an unmarked text is
    dismissed soon.

    Args:
        score: of keys [B].
        seed: the true key.
        length: elements of a key, which say how many are tried at once.
        resamples: keys to try.
    """
    random = np.random.default_rng(0)
    found = score(np.array([seed], np.uint64))[0]
    batch, better, tried = max(_CELLS // length, 1), 0, 0
    while tried < resamples:
        count = min(batch, resamples - tried)
        seeds = random.integers(0, 1 << 64, count, np.uint64)
        places = np.flatnonzero(score(seeds) >= found)
        if better + len(places) >= _ENOUGH:
            return float(found), _ENOUGH / (tried + int(places[_ENOUGH - better - 1]) + 1)
        better += len(places)
        tried += count
    return float(found), (1 + better) / (1 + tried)
