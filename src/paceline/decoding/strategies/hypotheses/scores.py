"""How searches score what may come next, and choose."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats, Request
from paceline.errors import ModelError, RequestError


def log_probs(logits: Floats, history: list[int], request: Request) -> NDArray[np.float64]:
    """Log chances [V] by a model's `logits`, plus what the controls add; -inf where they forbid.

    They are not normalised again: of the texts that the controls allow, a search shall find the
    one that the model likes best, and not one that it was forced into.

    Raises:
        ModelError: the model gave logits that are not numbers.
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
    found: NDArray[np.float64] = logits.astype(np.float64) - total
    return found


def best(scores: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """Flat places of the `count` best finite scores, best first; of equal ones the lower first."""
    flat = scores.ravel()
    if count < len(flat):
        least = np.partition(flat, len(flat) - count)[len(flat) - count]
        places = np.flatnonzero(flat >= least)
    else:
        places = np.arange(len(flat))
    places = places[np.isfinite(flat[places])]
    return places[np.argsort(-flat[places], kind="stable")][:count]


def dead_end(position: int) -> RequestError:
    """The error of a search that is left with nothing."""
    return RequestError(f"the controls allow no token at position {position}")
