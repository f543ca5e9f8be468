"""The rejection walk: the distribution of plain decoding, from randomly drawn drafts.

Leviathan et al. (arXiv 2211.17192, algorithm 1): a token x that was drafted from q is accepted with
probability min(1, p(x) / q(x)); otherwise p becomes the residual max(0, p - q), normalised.
Siblings that were drawn without replacement are tried in order, each against q without the ones
before it, as in Sequoia (arXiv 2402.12374); if all are rejected, the token is drawn from the
residual. So every token has distribution p whatever q is, but the token itself depends on the
drafts as well as the seed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats, Request, TokenTree
from paceline.decoding.walk import WalkResult, edited

_STREAM = 2  # separates these random numbers from those of drafters with the same seed


def rejection_walk(
    tree: TokenTree, logits: Floats, q: Floats, history: list[int], request: Request
) -> WalkResult:
    """Walk `tree` over its `logits` [N, V]; the drawn tokens are appended to `history`.

    Args:
        tree: the children of a node were drawn from its row of `q`, in this order.
        logits: from the model; with the request's controls, temperature included, they give p.
        q: [N, V], distribution that the children of each node were drawn from, without
            replacement.
        history: the prompt and all tokens drawn so far.
        request: its temperature is above 0.

    Raises:
        RequestError, ModelError: as `draw`.
    """
    walked = WalkResult([0], [], [])
    node: int | None = 0
    while node is not None:
        p = _softmax(edited(logits[node], history, request))
        random = np.random.default_rng((request.seed % (1 << 64), len(history), _STREAM))
        children = np.flatnonzero(tree.parents == node)
        token, place = settle(p, q[node], tree.tokens[children].tolist(), random)
        history.append(token)
        walked.drawn.append(token)
        walked.margins.append(np.inf)
        node = None if place is None else int(children[place])
        if node is not None:
            walked.path.append(node)
    return walked


def settle(
    p: NDArray[np.float64], q: Floats, drafts: list[int], random: np.random.Generator
) -> tuple[int, int | None]:
    """Draw a token from p [V], given drafts from q [V]; return it and its index among them."""
    rest = q.astype(np.float64)
    for place, token in enumerate(drafts):
        rest = rest / rest.sum()
        if random.random() * rest[token] < p[token]:
            return token, place
        residual = np.maximum(p - rest, 0.0)
        total = residual.sum()
        if total > 0:  # else p equals q up to rounding, and nothing is rejected
            p = residual / total
        rest[token] = 0.0
    bounds = np.cumsum(p)
    return int(np.searchsorted(bounds, random.random() * bounds[-1], side="right")), None


def _softmax(logits: Floats) -> NDArray[np.float64]:
    powers = np.exp(logits.astype(np.float64) - float(logits.max()))
    total: NDArray[np.float64] = powers / powers.sum()
    return total
