"""Scores of next tokens in searches, and choice of the best."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats, Request
from paceline.errors import ModelError, RequestError


def log_probs(logits: Floats, history: list[int], request: Request) -> NDArray[np.float64]:
    """Return log-probabilities [V] of `logits`, plus what the controls add; -inf if forbidden.

    They are not normalised after the controls: among the allowed texts, a search must find the one
    that the model finds most likely, not one that controls forced it into.

    Raises:
        ModelError: the model's logits are not finite.
    """
    wide = logits.astype(np.float64)
    top = float(wide.max())
    if not np.isfinite(top):
        raise ModelError(
            f"the model's logits at position {len(history)} are not finite; "
            "its weights or its number format cannot represent this text"
        )
    total = top + float(np.log(np.exp(wide - top).sum()))
    for control in request.controls:
        logits = control.apply(logits, history)
    scores: NDArray[np.float64] = logits.astype(np.float64) - total
    return scores


def best(scores: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """Return flat indices of the `count` best finite scores, best first, ties by index."""
    flat = scores.ravel()
    if count < len(flat):
        smallest = np.partition(flat, len(flat) - count)[len(flat) - count]
        places = np.flatnonzero(flat >= smallest)
    else:
        places = np.arange(len(flat))
    places = places[np.isfinite(flat[places])]
    return places[np.argsort(-flat[places], kind="stable")][:count]


def dead_end(position: int) -> RequestError:
    """Return the error of a search without any allowed token."""
    return RequestError(f"the controls allow no token at position {position}")
