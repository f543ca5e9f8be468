"""Trees grown by a draft model: a few passes, each over the most promising new nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

from paceline.core import Floats, Tokens, TokenTree
from paceline.drafters.base import single_origin_tree

Run = Callable[[TokenTree, int], Floats]
"""Run one pass over a tree; return logits [n, V] of its last n nodes."""

Judge = Callable[[Floats, Tokens], tuple[Tokens, Floats]]
"""Given logits [n, V] of nodes at depths [n]: return their most likely successors [n, K], best
first, and the probability [n, K] of each given its parent."""

Draw = Callable[[Floats, list[int]], tuple[Floats, list[Tokens]]]
"""Given logits [n, V] and counts: return distributions [n, V] and draws without replacement."""

Continue = Callable[[int, float], bool]
"""Given the passes so far and the probability of reaching the next: whether to run it."""


class GrowthLimits(NamedTuple):
    """Limits of the growth of a tree.

    Attributes:
        budget: most nodes beyond the root.
        width: nodes that each pass runs in addition.
        passes: most passes.
        levels: depth of the deepest node that may be run; negative if the root may not.
        more: whether to run another pass.
    """

    budget: int
    width: int
    passes: int
    levels: int
    more: Continue


class GrownTree(NamedTuple):
    """A tree, and the predictions at those of its nodes that were run.

    Attributes:
        tree: the proposal.
        rows: node to what `Judge` returned for it, or to its draws and distribution.
    """

    tree: TokenTree
    rows: dict[int, tuple[Tokens, Floats]]


class _Nodes:
    """Nodes in the order in which they are added; those that were run form a tree, too."""

    def __init__(self, root: int) -> None:
        self.tokens, self.parents, self.depths = [root], [-1], [0]
        self.scores, self.path_probs = [1.0], [1.0]
        self.run: list[int] = []  # nodes in the order in which they were run
        self.place: dict[int, int] = {}  # node -> index in `run`

    def add(self, parent: int, tokens: Sequence[int], scores: Sequence[float]) -> None:
        """Add children to a node."""
        n = len(tokens)
        self.tokens += tokens
        self.parents += [parent] * n
        self.depths += [self.depths[parent] + 1] * n
        self.scores += scores
        self.path_probs += [self.path_probs[parent] * score for score in scores]

    def expand(self, nodes: list[int], run: Run) -> Floats:
        """Run some nodes whose parents were run before; return their logits [n, V]."""
        for node in nodes:
            self.place[node] = len(self.run)
            self.run.append(node)
        parents = [self.place.get(self.parents[node], -1) for node in self.run]
        tokens = np.array([self.tokens[node] for node in self.run], np.int32)
        ones = np.ones(len(tokens), np.float32)
        return run(single_origin_tree(tokens, np.array(parents, np.int32), ones), len(nodes))

    def best(self, budget: int) -> list[int]:
        """Return the `budget` most likely nodes besides the root, best first, parents first."""
        probs = np.array(self.path_probs[1:])
        order = np.argsort(-probs, kind="stable")[:budget] + 1
        return [node for node in order.tolist() if self.path_probs[node] > 0]

    def fresh(self, best: list[int], width: int, levels: int) -> list[int]:
        """Return the first `width` of some nodes that may be run and have not been."""
        new = (n for n in best if n not in self.place and self.depths[n] <= levels)
        return [node for _, node in zip(range(width), new, strict=False)]

    def tree(self, nodes: list[int]) -> TokenTree:
        """Return the tree of some nodes, the root first and parents before children."""
        index = {node: place for place, node in enumerate(nodes)}
        parents = [index.get(self.parents[node], -1) for node in nodes]
        return single_origin_tree(
            np.array([self.tokens[node] for node in nodes], np.int32),
            np.array(parents, np.int32),
            np.array([self.scores[node] for node in nodes], np.float32),
        )


class GrowingTree:
    """A tree that grows pass by pass, and can continue from one of its nodes."""

    def __init__(self, root: int) -> None:
        self._nodes = _Nodes(root)
        self._rows: dict[int, tuple[Tokens, Floats]] = {}

    def begun(self) -> bool:
        """Return whether the root was run."""
        return bool(self._rows)

    def frontier(self, budget: int, width: int, levels: int) -> list[int]:
        """Return the nodes to run next: the likeliest of the best `budget`; at first the root."""
        if not self._rows:
            return [0] if budget > 0 and levels >= 0 else []
        return self._nodes.fresh(self._nodes.best(budget), width, levels)

    def reach(self, frontier: list[int]) -> float:
        """Return the total path probability of the frontier."""
        return sum(self._nodes.path_probs[node] for node in frontier)

    def step(self, frontier: list[int], run: Run, judge: Judge) -> None:
        """Run one pass over a frontier and all nodes that were run before."""
        nodes = self._nodes
        logits = nodes.expand(frontier, run)
        tokens, scores = judge(logits, np.array([nodes.depths[n] for n in frontier], np.int32))
        for place, node in enumerate(frontier):
            self._rows[node] = tokens[place], scores[place]
            nodes.add(node, tokens[place].tolist(), scores[place].tolist())

    def growth(self, budget: int) -> GrownTree:
        """Return the root and the best `budget` nodes."""
        kept = [0, *self._nodes.best(budget)]
        index = {node: place for place, node in enumerate(kept)}
        rows = {index[node]: row for node, row in self._rows.items() if node in index}
        return GrownTree(self._nodes.tree(kept), rows)

    def below(self, tokens: Sequence[int]) -> GrowingTree | None:
        """Return the part below the path that holds `tokens`; None if there is none."""
        nodes, root = self._nodes, 0
        for token in tokens:
            children = (n for n, parent in enumerate(nodes.parents) if parent == root)
            child = next((n for n in children if nodes.tokens[n] == token), None)
            if child is None:
                return None
            root = child
        part, place = GrowingTree(nodes.tokens[root]), {root: 0}
        for node in range(root + 1, len(nodes.tokens)):
            parent = place.get(nodes.parents[node])
            if parent is not None:
                place[node] = len(part._nodes.tokens)
                part._nodes.add(parent, [nodes.tokens[node]], [nodes.scores[node]])
        for node in nodes.run:
            if node in place:
                part._nodes.place[place[node]] = len(part._nodes.run)
                part._nodes.run.append(place[node])
                part._rows[place[node]] = self._rows[node]
        return part


def grow(root: int, limits: GrowthLimits, run: Run, judge: Judge) -> GrownTree:
    """Return the most likely nodes that a few passes find below the token `root`.

    Each pass runs the most likely nodes that were not run yet, among the best `budget` so far,
    together with those that were. This is EAGLE-2's growth (arXiv 2406.16858) with the best nodes
    of all levels as candidates.
    """
    budget, width, max_passes, levels, more = limits
    growing, passes = GrowingTree(root), 0
    frontier = growing.frontier(budget, width, levels)
    while frontier and passes < max_passes:
        growing.step(frontier, run, judge)
        passes += 1
        frontier = growing.frontier(budget, width, levels)
        if not more(passes, growing.reach(frontier)):
            break
    return growing.growth(budget)


def sample(
    root: int, limits: GrowthLimits, run: Run, draw: Draw, ranks: Sequence[float]
) -> GrownTree:
    """Return a tree whose siblings are drawn from the draft's distribution without replacement.

    The rejection walk requires that the number of a node's children does not depend on the draws.
    So the shape of the whole tree is chosen before anything is drawn, the best for `ranks`: the
    probabilities that the first, second, ... child is accepted if those before it are not (Sequoia,
    arXiv 2402.12374). Each pass runs one level. The rows of the result are the distributions.
    """
    budget, width, max_passes, levels, more = limits
    nodes, shape = _Nodes(root), _shape(budget, width, min(max_passes - 1, levels), ranks)
    rows: dict[int, tuple[Tokens, Floats]] = {}
    level, passes = [(0, 0)], 0  # nodes with children, and their index in the shape
    while level:
        logits = nodes.expand([node for node, _ in level], run)
        passes += 1
        distributions, draws = draw(logits, [len(shape[place]) for _, place in level])
        below: list[tuple[int, int]] = []
        for (node, place), row, drawn in zip(level, distributions, draws, strict=True):
            rows[node] = drawn, row
            first = len(nodes.tokens)
            nodes.add(node, drawn.tolist(), _unconditional(ranks[: len(drawn)]))
            children = zip(range(first, first + len(drawn)), shape[place], strict=False)
            below += [(child, theirs) for child, theirs in children if shape[theirs]]
        level = below
        if not more(passes, sum(nodes.path_probs[node] for node, _ in level)):
            break
    return GrownTree(nodes.tree(list(range(len(nodes.tokens)))), rows)


def _shape(budget: int, width: int, levels: int, ranks: Sequence[float]) -> list[list[int]]:
    """Return the children of each node of the tree with the largest gain, the root first."""
    shape: list[list[int]] = [[]]
    depths, probs = [0], [1.0]
    scores = _unconditional(ranks[:width])
    heap = (
        [(-scores[0], 0)] if levels >= 0 else []
    )  # minus the probability of the next child, parent
    while heap and len(shape) <= budget:
        negative, parent = heappop(heap)
        node = len(shape)
        shape[parent].append(node)
        shape.append([])
        depths.append(depths[parent] + 1)
        probs.append(-negative)
        if len(shape[parent]) < len(scores):
            heappush(heap, (-probs[parent] * scores[len(shape[parent])], parent))
        if depths[node] <= levels:
            heappush(heap, (negative * scores[0], node))
    return shape


def _unconditional(ranks: Sequence[float]) -> list[float]:
    """Return the probability of each child, from those given that earlier ones were rejected."""
    scores, left = [], 1.0
    for rank in ranks:
        scores.append(left * rank)
        left *= 1.0 - rank
    return scores
