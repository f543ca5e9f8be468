"""Token Recycling as published: a matrix of successors under a tree of fixed shape."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import prod

import numpy as np
from numpy.typing import NDArray

from paceline.core import Exactness, Request, State, Step, Tokens, TokenTree
from paceline.drafters.base import Drafter, DraftMethod, Target, single_origin_tree
from paceline.drafters.state import check_successors, checked
from paceline.errors import MethodError
from paceline.registry import Source, drafters

# Probability that the successor of each rank is the next token.
RANKS = (0.62, 0.13, 0.06, 0.035, 0.02, 0.015, 0.01, 0.008)
# Nodes at each depth of the paper's tree.
LEVELS = (8, 21, 25, 15, 8, 3)
_TREES = ("paper", "static")

Path = tuple[int, ...]  # a node, as the rank of every node from the root's child down to it


@drafters.register("token_recycling", Exactness.EXACT)
@dataclass(frozen=True)
class TokenRecycling(DraftMethod):
    """Keep the last top-8 predictions after each token, and draft by following them.

    A matrix has one row for each token of the vocabulary: the model's 8 most likely successors
    where the token was last seen. Every node of every pass overwrites its token's row, rejected
    nodes included. What followed a token in the prompt stands in until a pass has shown it. A tree
    of fixed shape is filled level by level: each node takes the successor of its rank from its
    parent's row, and a node without one is left out with all below it.
    `recycle` is our own development of the idea.

    State: 32 bytes for each token of the vocabulary; carried across requests. Cost of a proposal:
    some 30 microseconds in all, whatever the number of nodes.
    Good for: comparison with the paper; large budgets in little memory.

    Based on Luo et al., Turning Trash into Treasure, arXiv 2408.08696.

    Attributes:
        tree: `paper` is the paper's tree of 80 nodes (8, 21, 25, 15, 8 and 3 by depth), of which
            a smaller budget takes the most likely nodes; `static` is the tree of `budget` nodes
            with the largest sum of path probabilities, given the average probability of each
            rank. Default paper.
    """

    source = Source(
        authors="Luo et al.",
        title="Turning Trash into Treasure",
        arxiv="2408.08696",
        note="the paper draws its tree; here the nodes of each depth are the most likely ones",
    )
    catalogue = (40,)
    examples = ("token_recycling", "token_recycling:tree=static")

    tree: str = "paper"

    def __post_init__(self) -> None:
        if self.tree not in _TREES:
            raise MethodError(f"token_recycling:tree is {self.tree!r}, expected paper or static")

    def build(self, target: Target) -> Drafter:
        """Return a drafter with an empty matrix."""
        return _TokenRecycling(target.vocab_size, self.tree == "paper")


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


def _probability(path: Path) -> float:
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
    """Return the `budget` most likely nodes of the infinite tree."""
    paths: list[Path] = []
    open_: list[tuple[float, Path]] = [(-1.0, ())]
    while len(paths) <= budget:
        negative, path = heapq.heappop(open_)
        paths.append(path)
        for rank, p in enumerate(RANKS):
            heapq.heappush(open_, (negative * p, (*path, rank)))
    return _shape(paths[1:])


@cache
def paper_shape(budget: int) -> Shape:
    """Return the tree of 80 nodes, or the `budget` most likely of them.

    The paper gives the number of nodes at each depth; the most likely ones are taken, which leans
    the tree to the first ranks as in the paper's figure.
    """
    level: list[Path] = [()]
    paths: list[Path] = []
    for size in LEVELS:
        below = [(*path, rank) for path in level for rank in range(len(RANKS))]
        level = sorted(below, key=lambda path: (-_probability(path), path))[:size]
        paths += level
    return _shape(sorted(paths, key=lambda path: (-_probability(path), path))[:budget])


class _TokenRecycling(Drafter):
    """A matrix of the last top successors of every token, int32 [V, 8]."""

    origins = ("token_recycling",)

    def __init__(self, vocab_size: int, paper: bool) -> None:
        self.top_k = min(len(RANKS), vocab_size)
        self._vocab_size = vocab_size
        self._shape = paper_shape if paper else static_shape
        self._scores = np.array(RANKS, np.float32)
        # The last row is that of an unknown token, so that -1 leads to -1.
        self._matrix = np.full((vocab_size + 1, len(RANKS)), -1, np.int32)
        self._unread: tuple[int, ...] = ()  # prompt

    def begin(self, request: Request) -> None:
        self._unread = request.prompt

    def read_prompt(self) -> None:
        """Let the latest successors in the prompt stand for tokens that no pass has shown yet."""
        latest: dict[int, list[int]] = {}
        for token, after in zip(self._unread[-2::-1], self._unread[:0:-1], strict=True):
            row = latest.setdefault(token, [])
            if after not in row and len(row) < self.top_k:
                row.append(after)
        self._unread = ()
        for token, row in latest.items():
            if self._matrix[token, 0] < 0:
                self._matrix[token, : len(row)] = row

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
        # A known node has a known parent: whole subtrees are left out.
        place = np.cumsum(known) - 1
        parents = np.where(shape.parents < 0, -1, place[shape.parents])[known]
        return single_origin_tree(tokens[known], parents.astype(np.int32), scores[known])

    def observe(self, step: Step) -> None:
        self._matrix[step.tree.tokens, : step.top_tokens.shape[1]] = step.top_tokens

    def state(self) -> State:
        return {"matrix": self._matrix[:-1].copy()}

    def load(self, state: State) -> None:
        mine, ranges = {"matrix": self._matrix[:-1]}, {"matrix": (-1, self._vocab_size - 1)}
        checked("token_recycling", state, mine, ranges)
        check_successors("token_recycling", state["matrix"])
        self._matrix[:-1] = state["matrix"]

    def reset(self) -> None:
        self._matrix.fill(-1)
