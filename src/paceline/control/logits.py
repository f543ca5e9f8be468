"""Functions over logits that controls share."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paceline.core import Floats


def softmax(logits: Floats) -> NDArray[np.float64]:
    """Probabilities of `logits` [V]; a forbidden token has 0."""
    weights = np.exp(logits.astype(np.float64) - float(logits.max()))
    found: NDArray[np.float64] = weights / weights.sum()
    return found


def surprise(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """-log of `probabilities` [V], in nats; infinite where they are 0."""
    with np.errstate(divide="ignore"):
        found: NDArray[np.float64] = -np.log(probabilities)
    return found


def entropy(probabilities: NDArray[np.float64]) -> float:
    """Shannon entropy of `probabilities` [V], in nats."""
    some = probabilities[probabilities > 0]
    return float(-(some * np.log(some)).sum())


def forbid(logits: Floats, tokens: ArrayLike) -> Floats:
    """`logits` [V] without the tokens of an index array or mask."""
    edited = logits.copy()
    edited[np.asarray(tokens)] = -np.inf
    return edited


def keep_only(logits: Floats, kept: np.ndarray) -> Floats:
    """`logits` [V] with every token forbidden but those in the mask or index array `kept`."""
    edited = np.full_like(logits, -np.inf)
    edited[kept] = logits[kept]
    return edited
