"""The rejection walk: the same law as plain decoding, from guesses that were drawn by chance.

Leviathan et al. (arXiv 2211.17192, algorithm 1): a guess x that was drawn from q is accepted with
chance min(1, p(x) / q(x)); if it is not, p becomes what q did not cover, max(0, p - q) normalised.
Siblings drawn without replacement are tried in their order, each from q without those before it, as
in Sequoia (arXiv 2402.12374); what is left of p in the end gives the token. So every token follows
p, whatever q is; but which token, the guesses decide as well as the seed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats, Request, TokenTree
from paceline.decoding.walk import WalkResult, edited

_STREAM = 2  # tells these random numbers from those that drafters draw with the same seed


def rejection_walk(
    tree: TokenTree, logits: Floats, q: Floats, history: list[int], request: Request
) -> WalkResult:
    """Walk `tree` over its `logits` [N, V]; the drawn tokens are appended to `history`.

    Args:
        tree: the children of a node are draws from its row of `q`, in their order.
        logits: of the model; the request's controls, temperature among them, make p of them.
        q: [N, V], what the children of each node were drawn from, without replacement.
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
    p: NDArray[np.float64], q: Floats, guesses: list[int], random: np.random.Generator
) -> tuple[int, int | None]:
    """A token that follows p [V], and which of the guesses drawn from q [V] it is, if any."""
    rest = q.astype(np.float64)
    for place, token in enumerate(guesses):
        rest = rest / rest.sum()
        if random.random() * rest[token] < p[token]:
            return token, place
        uncovered = np.maximum(p - rest, 0.0)
        total = uncovered.sum()
        if total > 0:  # else p and q are the same but for rounding: nothing is to be refused
            p = uncovered / total
        rest[token] = 0.0
    bounds = np.cumsum(p)
    return int(np.searchsorted(bounds, random.random() * bounds[-1], side="right")), None


def _softmax(logits: Floats) -> NDArray[np.float64]:
    powers = np.exp(logits.astype(np.float64) - float(logits.max()))
    total: NDArray[np.float64] = powers / powers.sum()
    return total
