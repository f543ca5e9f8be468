"""Draws from logits whose head was read in part: which requests allow it, and how."""

from __future__ import annotations

import numpy as np

from paceline.control.capabilities import Truncates
from paceline.control.temperature import Temperature
from paceline.core import Floats, Request
from paceline.engines.screened import ScreenedLogits
from paceline.noise import noise_of, perturbation


def can_screen(request: Request) -> bool:
    """Whether draws of a request can be made from the logits of the best tokens alone.

    Greedy decoding, and sampling at any temperature with truncation that can say of a token that
    it is kept by those above it. Other controls edit or need every logit.
    """
    return request.walk == "gumbel" and all(
        isinstance(control, Temperature | Truncates) for control in request.controls
    )


def draw_screened(
    logits: ScreenedLogits, node: int, history: list[int], request: Request
) -> int | None:
    """Draw the token that `walk.draw` draws from the exact logits of a node.

    Returns:
        the token; None where all logits are needed.
    """
    scaling = next((c for c in request.controls if isinstance(c, Temperature)), None)
    truncating = [c for c in request.controls if isinstance(c, Truncates)]
    start = noise_of(request, len(history))
    found = logits.contenders(node, scaling.value if scaling else 1.0, start)
    if found is None:
        return None
    tokens, values = found
    scores = _scaled(scaling, values, history)
    if not np.isfinite(scores.max(initial=-np.inf)):
        return None
    if start is None:  # the most likely token is drawn, which every truncation keeps
        return int(tokens[scores.argmax()])
    place = int((scores.astype(np.float64) + perturbation(start, tokens)).argmax())
    if truncating:
        above = logits.at_least(node, float(values[place]))
        if above is None:
            return None
        others = _scaled(scaling, above[1], history)
        if not all(control.keeps(scores[place], others) for control in truncating):
            return None
    return int(tokens[place])


def _scaled(scaling: Temperature | None, logits: Floats, history: list[int]) -> Floats:
    return scaling.apply(logits, history) if scaling else logits
