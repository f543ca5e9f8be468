"""Functions of logits that controls share."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paceline.core import Floats


def softmax(logits: Floats) -> NDArray[np.float64]:
    """Return the probabilities of `logits` [V], float64; 0 for forbidden tokens."""
    weights = np.exp(logits.astype(np.float64) - float(logits.max()))
    probabilities: NDArray[np.float64] = weights / weights.sum()
    return probabilities


def surprise(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return -log of `probabilities` [V], in nats; infinite where they are 0."""
    with np.errstate(divide="ignore"):
        nats: NDArray[np.float64] = -np.log(probabilities)
    return nats


def entropy(probabilities: NDArray[np.float64]) -> float:
    """Return the Shannon entropy of `probabilities` [V], in nats."""
    positive = probabilities[probabilities > 0]
    return float(-(positive * np.log(positive)).sum())


def forbid(logits: Floats, tokens: ArrayLike) -> Floats:
    """Return `logits` [V] with the tokens of an index array or mask at -inf."""
    edited = logits.copy()
    edited[np.asarray(tokens)] = -np.inf
    return edited


def keep_only(logits: Floats, kept: np.ndarray) -> Floats:
    """Return `logits` [V] with all tokens at -inf but those of the mask or index array `kept`."""
    edited = np.full_like(logits, -np.inf)
    edited[kept] = logits[kept]
    return edited
