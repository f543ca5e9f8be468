"""Dropping of drafted nodes that controls will reject, and adding of tokens that must follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from paceline.control.capabilities import ExtendsDrafts, FiltersDrafts
from paceline.core import TokenTree


def filter_tree(
    tree: TokenTree, controls: Sequence[FiltersDrafts], history: list[int], max_nodes: int
) -> TokenTree:
    """Return `tree` without the nodes that controls reject, and with the tokens they force.

    The score of a dropped node is shared out among its siblings. Of more than `max_nodes` nodes
    below the root, the most likely are kept.
    """
    for control in controls if len(tree) > 1 else ():
        if isinstance(control, ExtendsDrafts):
            kept, chains = control.extensions(history, tree)
            tree = _continued(_kept(tree, kept), chains, np.flatnonzero(kept).tolist())
        else:
            tree = _kept(tree, control.allows(history, tree))
    return _most_likely(tree, max_nodes)


def _kept(tree: TokenTree, kept: NDArray[np.bool_]) -> TokenTree:
    if kept.all():
        return tree
    dropped = np.zeros(len(tree), np.float32)
    lost = ~kept & kept[tree.parents]
    np.add.at(dropped, tree.parents[lost], tree.scores[lost])
    left = np.maximum(1.0 - dropped[tree.parents], 1e-6)
    scores = np.minimum(tree.scores / left, 1.0).astype(np.float32)
    scores[0] = 1.0
    return TokenTree(tree.tokens, tree.parents, scores, tree.origin).keep(kept)


def _continued(tree: TokenTree, chains: Mapping[int, list[int]], names: list[int]) -> TokenTree:
    """Return `tree` with forced chains after some nodes; `names` [N] are its nodes in `chains`.

    The new nodes have the origin of the node that they follow.
    """
    if not chains:
        return tree
    tokens, parents, origin = tree.tokens.tolist(), tree.parents.tolist(), tree.origin.tolist()
    for node, name in enumerate(names):
        above = node
        for token in chains.get(name, ()):
            parents.append(above)
            above = len(tokens)
            tokens.append(token)
            origin.append(origin[node])
    scores = np.ones(len(tokens), np.float32)
    scores[: len(tree)] = tree.scores
    return TokenTree(
        np.array(tokens, np.int32),
        np.array(parents, np.int32),
        scores,
        np.array(origin, np.int16),
    )


def _most_likely(tree: TokenTree, max_nodes: int) -> TokenTree:
    if len(tree) <= max_nodes + 1:
        return tree
    path_probs = tree.scores.tolist()
    for node, parent in enumerate(tree.parents.tolist()[1:], 1):
        path_probs[node] *= path_probs[parent]
    kept = np.zeros(len(tree), bool)
    # The sort is stable, so a parent precedes its children where they are equally likely.
    kept[np.argsort(-np.array(path_probs), kind="stable")[: max_nodes + 1]] = True
    return tree.keep(kept)
