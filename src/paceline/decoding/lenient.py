"""The lenient walk of lossy drafters: a node is accepted if it is likely enough."""

from __future__ import annotations

import numpy as np

from paceline.core import Floats, Request, TokenTree
from paceline.decoding.walk import WalkResult, draw, edited


def lenient_walk(
    tree: TokenTree, logits: Floats, history: list[int], request: Request, rollback: float
) -> WalkResult:
    """Walk `tree` over its `logits` [N, V]; the drawn tokens are appended to `history`.

    Like `walk`, except that where no child holds the drawn token, the most likely child is accepted
    if its surprise, -log p after the controls, is at most `rollback` nats: BiLD's rollback policy
    (arXiv 2302.07863).
    """
    walked = WalkResult([0], [], [])
    while True:
        node = walked.path[-1]
        token, _ = draw(logits[node], history, request)
        child = tree.child(node, token)
        children = np.flatnonzero(tree.parents == node)
        if child is None and len(children):
            best = int(children[tree.scores[children].argmax()])
            row = edited(logits[node], history, request).astype(np.float64)
            surprise = np.log(np.exp(row - row.max()).sum()) + row.max() - row[tree.tokens[best]]
            if surprise <= rollback:
                child, token = best, int(tree.tokens[best])
        history.append(token)
        walked.drawn.append(token)
        walked.margins.append(np.inf)
        if child is None:
            return walked
        walked.path.append(child)
