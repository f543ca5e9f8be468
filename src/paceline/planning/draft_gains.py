"""What passes with smaller trees would have gained, from recorded passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from paceline.core import TokenTree
from paceline.decoding.governor import Paths, Trees
from paceline.planning.measured_facts import MAX_NODES

# Path probabilities from which nodes are kept.
THRESHOLDS = np.array([0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.22, 0.15, 0.1, 0.06, 0.03])


def passes_needed(trees: Trees, paths: Paths, max_nodes: int = MAX_NODES) -> NDArray[np.float64]:
    """Return the passes that smaller trees would have taken for the same tokens.

    A tree is cut to its n nodes with the highest path probabilities. Where a smaller tree misses a
    token that the recorded one held, a further pass begins behind that token, and its tree is what
    the recorded one holds below it.

    Returns:
        float64 [max_nodes + 1], for each n; with as many nodes as were recorded, their passes.
    """
    total = np.zeros(max_nodes + 1)
    for tree, path in zip(trees, paths, strict=True):
        ranks = [_ranks(probs, path[at + 1 :]) for at, probs in enumerate(_below(tree, path))]
        for budget in range(max_nodes + 1):
            total[budget] += sum(1 for _ in _starts(ranks, budget))
    return total


def likely_passes(trees: Trees, paths: Paths) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what passes with likely nodes alone would have taken for the same tokens.

    An automatic budget is no fixed number: it keeps the nodes whose path probability pays, many in
    one pass and none in another.

    Returns:
        sums for each of `THRESHOLDS`: passes, and their nodes beyond the root.
    """
    passes, nodes = np.zeros(len(THRESHOLDS)), np.zeros(len(THRESHOLDS))
    for tree, path in zip(trees, paths, strict=True):
        below = list(_below(tree, path))
        improbable = [-probs[path[at + 1 :]] for at, probs in enumerate(below)]
        sizes = [(probs[:, None] >= THRESHOLDS).sum(0) for probs in below]
        for number, threshold in enumerate(THRESHOLDS):
            for start in _starts(improbable, -threshold):
                passes[number] += 1
                nodes[number] += sizes[start][number]
    return passes, nodes


def tree_sizes(trees: Trees, max_nodes: int = MAX_NODES) -> NDArray[np.float64]:
    """Return the nodes beyond the root of all trees, cut to n nodes each, float64 [max_nodes + 1].

    A drafter may propose fewer than it may, or none.
    """
    nodes = np.array([len(tree) - 1 for tree in trees], np.float64)
    total: NDArray[np.float64] = np.minimum(nodes[:, None], np.arange(max_nodes + 1.0)[None]).sum(0)
    return total


def _starts(needed: Sequence[NDArray[np.float64]], limit: float) -> Iterator[int]:
    """Yield where on a recorded path passes begin whose trees hold what needs at most `limit`."""
    at = 0
    while at < len(needed):
        yield at
        missed = np.flatnonzero(needed[at] > limit)
        if not len(missed):
            return
        at += int(missed[0]) + 1


def _below(tree: TokenTree, path: Sequence[int]) -> Iterator[NDArray[np.float64]]:
    """Yield the path probability of every node below each node of a path; -1 for others."""
    for root in path:
        probs = np.full(len(tree), -1.0)
        probs[root] = 1.0
        for node in range(root + 1, len(tree)):
            above = probs[tree.parents[node]]
            probs[node] = tree.scores[node] * above if above >= 0 else -1.0
        probs[root] = -1.0
        yield probs


def _ranks(probs: NDArray[np.float64], nodes: Sequence[int]) -> NDArray[np.float64]:
    """Return the place of nodes among all by probability, from 1."""
    rank = np.empty(len(probs))
    rank[np.argsort(-probs, kind="stable")] = np.arange(1, len(probs) + 1)
    found: NDArray[np.float64] = rank[list(nodes)]
    return found
