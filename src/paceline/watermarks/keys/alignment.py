"""Alignment of a text with a key sequence, and its p-value by random keys."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats

Seeds = NDArray[np.uint64]
_CELLS = 1 << 13  # floats that are processed at once, to fit a small cache
_ENOUGH = 10  # random keys as good as the true one after which a p-value is clear enough


def best_alignment(rows: Floats, order: NDArray[np.integer], gap: float) -> Floats:
    """Return the score of the best local alignment of a text with circular key sequences, [B].

    Smith and Waterman (1981) with the costs of Kuditipudi et al. (arXiv 2307.15593, definition 5):
    a token is aligned with a key element and scores, or is skipped at cost `gap`; an element can be
    skipped at cost `gap`, too, at most two in a row.

    Args:
        rows: [D, B, L], score of each distinct token at each element of B keys. Negative on
            average, so that an unrelated text aligns in short pieces only.
        order: [M], the text as indices into `rows`.
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
    """Return a score and its p-value from random keys, which is exact for every text.

    It is (1 + keys as good) / (1 + keys tried), or ten / keys tried once ten keys are as good
    (Besag and Clifford, Sequential Monte Carlo p-values, 1991), so that unmarked texts are
    dismissed quickly.

    Args:
        score: from keys [B] to scores [B].
        seed: the true key.
        length: elements of a key, which decides how many are tried at once.
        resamples: number of keys to try.
    """
    random = np.random.default_rng(0)
    own_score = score(np.array([seed], np.uint64))[0]
    batch, better, tried = max(_CELLS // length, 1), 0, 0
    while tried < resamples:
        count = min(batch, resamples - tried)
        seeds = random.integers(0, 1 << 64, count, np.uint64)
        places = np.flatnonzero(score(seeds) >= own_score)
        if better + len(places) >= _ENOUGH:
            return float(own_score), _ENOUGH / (tried + int(places[_ENOUGH - better - 1]) + 1)
        better += len(places)
        tried += count
    return float(own_score), (1 + better) / (1 + tried)
