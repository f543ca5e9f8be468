"""Baum-Welch training of hidden Markov models (Baum 1970; Rabiner 1989, III.C)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from paceline.control.lexical.hmm import Doubles, Hmm
from paceline.core import Tokens

_PRIOR = 1e-3  # pseudo-count, so that no probability is 0
_BATCH = 1 << 21  # positions x states of a batch: 16 MB for each of a few arrays


class Counts(NamedTuple):
    """Expected counts of first states [Z], transitions [Z, Z] and emissions [Z, V]."""

    initial: Doubles
    transition: Doubles
    emission: Doubles


def improve(hmm: Hmm, texts: Sequence[Tokens]) -> tuple[Hmm, float]:
    """Run one round of expectation-maximisation over `texts`.

    Returns:
        the improved HMM, and the mean log-likelihood of a token under `hmm`, in nats.
    """
    shapes = (hmm.initial.shape, hmm.transition.shape, hmm.emission.shape)
    counts = Counts(*(np.full(shape, _PRIOR) for shape in shapes))
    total = 0.0
    for tokens, inside in _batches(texts, len(hmm.initial)):
        total += _count(hmm, tokens, inside, counts)
    better = Hmm(*(part / part.sum(-1, keepdims=True) for part in counts))
    return better, total / sum(map(len, texts))


def _batches(
    texts: Sequence[Tokens], states: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
    """Yield batches of texts of similar length: tokens [T, N], and a mask of real ones [T, N]."""
    ordered = sorted((text for text in texts if len(text)), key=len, reverse=True)
    while ordered:
        longest = len(ordered[0])
        size = max(1, _BATCH // (longest * states))
        batch, ordered = ordered[:size], ordered[size:]
        tokens = np.zeros((longest, len(batch)), np.int64)
        inside = np.zeros((longest, len(batch)), bool)
        for column, text in enumerate(batch):
            tokens[: len(text), column] = text
            inside[: len(text), column] = True
        yield tokens, inside


def _count(hmm: Hmm, tokens: NDArray[np.int64], inside: NDArray[np.bool_], counts: Counts) -> float:
    """Add the expected counts of one batch [T, N] to `counts`; return its log-likelihood."""
    # After the end of a text all tokens have likelihood 1, so nothing is learned there.
    seen = np.where(inside[..., None], hmm.emission.T[tokens], 1.0)  # [T, N, Z]
    before = np.empty_like(seen)  # P(state | tokens up to here)
    scale = np.empty(tokens.shape)
    predicted = np.broadcast_to(hmm.initial, seen.shape[1:])
    for t in range(len(tokens)):
        both = predicted * seen[t]
        scale[t] = both.sum(1)
        before[t] = both / scale[t, :, None]
        predicted = before[t] @ hmm.transition
    after = np.ones(seen.shape[1:])  # P(tokens from here on | state), scaled
    pairs = np.zeros_like(hmm.transition)
    shares = np.empty_like(seen)  # P(state | all tokens)
    for t in reversed(range(len(tokens))):
        shares[t] = before[t] * after
        if t:
            later = seen[t] * after / scale[t, :, None]
            pairs += before[t - 1].T @ (later * inside[t, :, None])
            after = later @ hmm.transition.T
    counts.initial[...] += shares[0].sum(0)
    counts.transition[...] += pairs * hmm.transition
    flat, order = shares[inside], np.argsort(tokens[inside], kind="stable")
    ids, first = np.unique(tokens[inside][order], return_index=True)
    counts.emission[:, ids] += np.add.reduceat(flat[order], first, axis=0).T
    return float(np.log(scale[inside]).sum())
