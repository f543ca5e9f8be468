"""What passes with smaller trees would have gained, from recorded passes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from paceline.core import TokenTree
from paceline.decoding.governor import Paths, Trees
from paceline.planning.measured_facts import MAX_NODES

# Path probabilities from which nodes are kept.
THRESHOLDS = np.array([0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.22, 0.15, 0.1, 0.06, 0.03])


def gains(trees: Trees, paths: Paths, max_nodes: int = MAX_NODES) -> NDArray[np.float64]:
    """Return the tokens that passes would have gained with smaller trees, float64 [max_nodes + 1].

    A tree is cut to its n nodes with the highest path probabilities; entry n is the sum over the
    passes of 1 for the root and 1 for each accepted node that is left.
    """
    total = np.zeros(max_nodes + 1)
    for tree, path in zip(trees, paths, strict=True):
        probs = _path_probs(tree)
        rank = np.empty(len(tree), np.int64)  # of each node, the root first
        rank[np.argsort(-probs, kind="stable")] = np.arange(len(tree))
        needed = np.array([rank[node] for node in path[1:]], np.int64)
        total += 1 + (needed[:, None] <= np.arange(max_nodes + 1)[None]).sum(0)
    return total


def likely_gains(trees: Trees, paths: Paths) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what passes would have gained with their likely nodes alone, and how many these are.

    An automatic budget is no fixed number: it keeps the nodes whose path probability pays, many in
    one pass and none in another.

    Returns:
        sums over the passes for each of `THRESHOLDS`: tokens, and nodes beyond the root.
    """
    gained, nodes = np.zeros(len(THRESHOLDS)), np.zeros(len(THRESHOLDS))
    for tree, path in zip(trees, paths, strict=True):
        probs = _path_probs(tree)
        gained += 1 + (probs[path[1:]][:, None] >= THRESHOLDS).sum(0)
        nodes += (probs[1:, None] >= THRESHOLDS).sum(0)
    return gained, nodes


def _path_probs(tree: TokenTree) -> NDArray[np.float64]:
    """Return the path probability of each node; infinite for the root."""
    probs = np.array(tree.scores, np.float64)
    for node in range(1, len(tree)):
        probs[node] *= probs[tree.parents[node]] if tree.parents[node] else 1.0
    probs[0] = np.inf
    return probs


def tree_sizes(trees: Trees, max_nodes: int = MAX_NODES) -> NDArray[np.float64]:
    """Return the nodes beyond the root of all trees, cut to n nodes each, float64 [max_nodes + 1].

    A drafter may propose fewer than it may, or none.
    """
    nodes = np.array([len(tree) - 1 for tree in trees], np.float64)
    total: NDArray[np.float64] = np.minimum(nodes[:, None], np.arange(max_nodes + 1.0)[None]).sum(0)
    return total
