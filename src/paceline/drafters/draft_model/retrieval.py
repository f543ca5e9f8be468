"""BM25 over the pieces of a prompt, by tokens and pairs of tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from paceline.core import Tokens

_SATURATION, _LENGTH = 1.2, 0.75  # k1 and b of BM25, at their usual values


def best_pieces(text: Tokens, query: Tokens, size: int, count: int) -> list[int]:
    """Return the pieces of a text that answer a query best, increasing.

    Based on Robertson and Zaragoza, The Probabilistic Relevance Framework: BM25 and Beyond (2009),
    formula 3.15, with log(1 + ...) in the weight of a term, so that none is negative. The terms are
    tokens and pairs of neighbours: most words are made of several tokens.

    Args:
        text: int32 [S]; piece i holds the tokens from `i * size` on.
        query: int32 [Q].
        size: tokens of a piece, the last one may have fewer.
        count: most pieces; those that share no term with the query are not among them.
    """
    if not len(text) or not len(query) or count < 1:
        return []
    pieces = -(-len(text) // size)
    wanted = np.unique(_terms(query)[0])
    terms, places = _terms(text)
    found = np.minimum(np.searchsorted(wanted, terms), len(wanted) - 1)
    hit = wanted[found] == terms
    counts = np.zeros((len(wanted), pieces))
    np.add.at(counts, (found[hit], places[hit] // size), 1)
    within = (counts > 0).sum(1)
    weights = np.log1p((pieces - within + 0.5) / (within + 0.5))
    lengths = np.minimum(size, len(text) - size * np.arange(pieces))
    norm = _SATURATION * (1 - _LENGTH + _LENGTH * lengths / lengths.mean())
    scores = weights @ (counts * (_SATURATION + 1) / (counts + norm))
    best = np.argsort(-scores, kind="stable")[:count]
    return sorted(best[scores[best] > 0].tolist())


def _terms(text: Tokens) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the terms of a text and the position of each, that of its first token."""
    wide, at = text.astype(np.int64), np.arange(len(text))
    pairs = (wide[:-1] + 1) << 32 | wide[1:]
    return np.concatenate([wide, pairs]), np.concatenate([at, at[:-1]])
