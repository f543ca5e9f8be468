"""Token Recycling as published: a matrix of successors, and trees of fixed shape over it."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import prod

import numpy as np
from numpy.typing import NDArray

from paceline.core import State, Step, Tokens, TokenTree
from paceline.drafters.base import Drafter, single_origin_tree
from paceline.errors import MethodError

# Chance that the successor of each rank is the next token.
RANKS = (0.62, 0.13, 0.06, 0.035, 0.02, 0.015, 0.01, 0.008)
# Nodes at each depth of the paper's tree.
LEVELS = (8, 21, 25, 15, 8, 3)

Path = tuple[int, ...]  # a node, as the rank of every node from the root's child down to it


@dataclass(frozen=True, eq=False)
class Shape:
    """A tree without tokens, its nodes by depth. Axis N counts the root.

    Attributes:
        parents: [N], -1 for the root.
        ranks: [N], which of its parent's successors a node is.
        levels: the nodes of each depth below the root.
    """

    parents: NDArray[np.int64]
    ranks: NDArray[np.int64]
    levels: tuple[slice, ...]


def _chance(path: Path) -> float:
    return prod(RANKS[rank] for rank in path)


def _shape(paths: list[Path]) -> Shape:
    ordered = sorted([(), *paths], key=lambda path: (len(path), path))
    index = {path: node for node, path in enumerate(ordered)}
    parents = [index[path[:-1]] if path else -1 for path in ordered]
    depths = np.array([len(path) for path in ordered])
    starts = np.searchsorted(depths, np.arange(1, depths[-1] + 2))
    levels = tuple(slice(a, b) for a, b in pairwise(starts))
    ranks = [path[-1] if path else 0 for path in ordered]
    return Shape(np.array(parents), np.array(ranks), levels)


@cache
def static_shape(budget: int) -> Shape:
    """The `budget` likeliest nodes of all trees."""
    paths: list[Path] = []
    open_: list[tuple[float, Path]] = [(-1.0, ())]
    while len(paths) <= budget:
        chance, path = heapq.heappop(open_)
        paths.append(path)
        for rank, p in enumerate(RANKS):
            heapq.heappush(open_, (chance * p, (*path, rank)))
    return _shape(paths[1:])


@cache
def paper_shape(budget: int) -> Shape:
    """The tree of 80 nodes, or the `budget` likeliest of them.

    The paper gives the size of each level; within a level the likeliest nodes are taken, which
    leans the tree to the first ranks as in the paper's figure.
    """
    level: list[Path] = [()]
    paths: list[Path] = []
    for size in LEVELS:
        below = [(*path, rank) for path in level for rank in range(len(RANKS))]
        level = sorted(below, key=lambda path: (-_chance(path), path))[:size]
        paths += level
    return _shape(sorted(paths, key=lambda path: (-_chance(path), path))[:budget])


class _Matrix(Drafter):
    """The last top successors of every token, int32 [V, 8], under a tree of fixed shape."""

    origins = ("recycle",)
    learns_from_prompt = True

    def __init__(self, vocab_size: int, paper: bool) -> None:
        self.top_k = min(len(RANKS), vocab_size)
        self._vocab_size = vocab_size
        self._shape = paper_shape if paper else static_shape
        self._scores = np.array(RANKS, np.float32)
        # The last row is that of an unknown token, so that -1 leads to -1.
        self._matrix = np.full((vocab_size + 1, len(RANKS)), -1, np.int32)

    def propose(self, context: Tokens, budget: int, min_path_prob: float = 0.0) -> TokenTree:
        shape = self._shape(budget)
        tokens = np.empty(len(shape.parents), np.int32)
        tokens[0] = context[-1]
        for level in shape.levels:
            tokens[level] = self._matrix[tokens[shape.parents[level]], shape.ranks[level]]
        scores = self._scores[shape.ranks]
        scores[0] = 1.0
        known = tokens >= 0
        if known.all():
            return single_origin_tree(tokens, shape.parents.astype(np.int32), scores)
        # A known node has a known parent: what is left out are whole subtrees.
        place = np.cumsum(known) - 1
        parents = np.where(shape.parents < 0, -1, place[shape.parents])[known]
        return single_origin_tree(tokens[known], parents.astype(np.int32), scores[known])

    def observe(self, step: Step) -> None:
        self._matrix[step.tree.tokens, : step.top_tokens.shape[1]] = step.top_tokens

    def state(self) -> State:
        return {"matrix": self._matrix[:-1].copy()}

    def load(self, state: State) -> None:
        rows = state.get("matrix")
        mine = self._matrix[:-1]
        if rows is None or rows.shape != mine.shape or rows.dtype != mine.dtype:
            raise MethodError(
                f"this state is not of recycle's matrix over {self._vocab_size} tokens; reset it"
            )
        ranked = np.sort(rows, axis=1)
        twice = (ranked[:, 1:] == ranked[:, :-1]) & (ranked[:, 1:] >= 0)
        if rows.min() < -1 or rows.max() >= self._vocab_size or twice.any():
            raise MethodError("this state of recycle holds impossible successors; reset it")
        mine[:] = rows

    def reset(self) -> None:
        self._matrix.fill(-1)


def matrix(vocab_size: int, paper: bool) -> Drafter:
    """A drafter with an empty matrix, under the paper's tree or the static one."""
    return _Matrix(vocab_size, paper)
