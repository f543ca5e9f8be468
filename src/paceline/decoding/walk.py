"""The walk: draw one token at each visited node from the model's own distribution.

If a child holds the drawn token, the walk steps into the child; otherwise it stops, and the token
is the next root. Nothing depends on how the tree was drafted, so the output is that of plain
decoding, which is the walk of a tree with one node.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from paceline import _native
from paceline.core import Floats, Request, TokenTree
from paceline.decoding.screened_walk import draw_screened
from paceline.engines.screened import Logits, ScreenedLogits
from paceline.errors import ModelError, RequestError
from paceline.noise import REACH, noise_of, perturbation


class WalkResult(NamedTuple):
    """The accepted nodes, root first, the token drawn at each, and its margin if requested."""

    path: list[int]
    drawn: list[int]
    margins: list[float]


def draw(
    logits: Floats, history: list[int], request: Request, want_margin: bool = False
) -> tuple[int, float]:
    """Draw the token that follows `history` from `logits` [V], float32.

    The token maximises logit + noise; among equals the lowest id wins. At temperature 0 there is no
    noise. The logits are divided by the temperature before, by a `Temperature` control. The noise
    comes from the seed, or from a watermark's `Request.noise`.

    Returns:
        the token, and the margin to the second best (infinite if not requested).

    Raises:
        RequestError: the controls allow no token.
        ModelError: the model's logits are not finite.
    """
    logits = edited(logits, history, request)
    best = int(logits.argmax())
    top = float(logits[best])
    start = noise_of(request, len(history))
    if start is None and not want_margin:
        return best, np.inf
    scores = logits.astype(np.float64)
    if start is not None:
        tokens = (
            np.flatnonzero(logits >= top - REACH).astype(np.int32)
            if want_margin  # the second best is needed, too
            else _native.contenders(logits, start)
        )
        scores = scores[tokens] + perturbation(start, tokens)
        best = int(tokens[scores.argmax()])
    if not want_margin or len(scores) == 1:
        return best, np.inf
    first, second = np.partition(scores, -2)[[-1, -2]]
    return best, float(first - second)


def edited(logits: Floats, history: list[int], request: Request) -> Floats:
    """Return `logits` [V] after the request's controls.

    Raises:
        RequestError, ModelError: as `draw`.
    """
    for control in request.controls:
        logits = control.apply(logits, history)
    top = float(logits.max())
    if not np.isfinite(top):
        if top == -np.inf:
            raise RequestError(f"the controls allow no token at position {len(history)}")
        raise ModelError(
            f"the model's logits at position {len(history)} are not finite; "
            "its weights or its number format cannot represent this text"
        )
    return logits


def walk(
    tree: TokenTree,
    logits: Logits,
    history: list[int],
    request: Request,
    want_margin: bool = False,
) -> WalkResult:
    """Walk `tree` over its `logits` [N, V]; the drawn tokens are appended to `history`.

    Of screened logits, only those rows of the head are computed that can win at a visited node.
    """
    walked = WalkResult([0], [], [])
    while True:
        node = walked.path[-1]
        token, margin = _draw_at(logits, node, history, request, want_margin)
        history.append(token)
        walked.drawn.append(token)
        walked.margins.append(margin)
        child = tree.child(node, token) if len(tree) > 1 else None
        if child is None:
            return walked
        walked.path.append(child)


def _draw_at(
    logits: Logits, node: int, history: list[int], request: Request, want_margin: bool
) -> tuple[int, float]:
    """Draw at a node; see `draw`. A margin needs all logits."""
    if isinstance(logits, ScreenedLogits):
        token = None if want_margin else draw_screened(logits, node, history, request)
        if token is not None:
            return token, np.inf
        return draw(logits.row(node), history, request, want_margin)
    return draw(logits[node], history, request, want_margin)
