"""Trees grown by a model that drafts: a few passes, each over the most promising new nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

from paceline.core import Floats, Tokens, TokenTree
from paceline.drafters.base import single_origin_tree

Run = Callable[[TokenTree, int], Floats]
"""Logits [n, V] of the last n nodes of a tree, after one pass over it."""

Judge = Callable[[Floats, Tokens], tuple[Tokens, Floats]]
"""For logits [n, V] of nodes at depths [n]: their likeliest successors [n, K], best first, and the
chance [n, K] that each is the one, given its parent."""

Draw = Callable[[Floats, list[int]], tuple[Floats, list[Tokens]]]
"""For logits [n, V]: the distributions q [n, V], and so many draws from each, none twice."""

Continue = Callable[[int, float], bool]
"""After this many passes, is another one worth it that is reached with that chance?"""


class GrowthLimits(NamedTuple):
    """How far a tree may grow.

    Attributes:
        budget: most nodes beyond the root.
        width: nodes that each pass adds to those that were run.
        passes: most of them.
        levels: deepest node that may be run; negative where not even the root may.
        more: ends it before.
    """

    budget: int
    width: int
    passes: int
    levels: int
    more: Continue


class GrownTree(NamedTuple):
    """A tree, and for each of its nodes that was run what was thought to follow it.

    Attributes:
        tree: the guesses.
        rows: node -> what the judge, or the sampler, said of it.
    """

    tree: TokenTree
    rows: dict[int, tuple[Tokens, Floats]]


class _Nodes:
    """Nodes as they are added; the ones that were run are a tree of their own."""

    def __init__(self, root: int) -> None:
        self.tokens, self.parents, self.depths = [root], [-1], [0]
        self.scores, self.chances = [1.0], [1.0]
        self.run: list[int] = []  # nodes in the order in which they were run
        self.place: dict[int, int] = {}  # node -> index in `run`

    def add(self, parent: int, tokens: Sequence[int], scores: Sequence[float]) -> None:
        """Children of a node."""
        n = len(tokens)
        self.tokens += tokens
        self.parents += [parent] * n
        self.depths += [self.depths[parent] + 1] * n
        self.scores += scores
        self.chances += [self.chances[parent] * score for score in scores]

    def expand(self, nodes: list[int], run: Run) -> Floats:
        """Run some nodes, whose parents were run before; logits [n, V]."""
        for node in nodes:
            self.place[node] = len(self.run)
            self.run.append(node)
        parents = [self.place.get(self.parents[node], -1) for node in self.run]
        tokens = np.array([self.tokens[node] for node in self.run], np.int32)
        ones = np.ones(len(tokens), np.float32)
        return run(single_origin_tree(tokens, np.array(parents, np.int32), ones), len(nodes))

    def best(self, budget: int) -> list[int]:
        """The likeliest `budget` nodes besides the root, likeliest first, parents before theirs."""
        chances = np.array(self.chances[1:])
        order = np.argsort(-chances, kind="stable")[:budget] + 1
        return [node for node in order.tolist() if self.chances[node] > 0]

    def fresh(self, best: list[int], width: int, levels: int) -> list[int]:
        """The first `width` of some nodes that were not run yet and may be."""
        new = (n for n in best if n not in self.place and self.depths[n] <= levels)
        return [node for _, node in zip(range(width), new, strict=False)]

    def tree(self, nodes: list[int]) -> TokenTree:
        """The root and some nodes, parents before theirs."""
        index = {node: place for place, node in enumerate(nodes)}
        parents = [index.get(self.parents[node], -1) for node in nodes]
        return single_origin_tree(
            np.array([self.tokens[node] for node in nodes], np.int32),
            np.array(parents, np.int32),
            np.array([self.scores[node] for node in nodes], np.float32),
        )


class GrowingTree:
    """A tree that grows pass by pass, and can be carried on below one of its nodes."""

    def __init__(self, root: int) -> None:
        self._nodes = _Nodes(root)
        self._rows: dict[int, tuple[Tokens, Floats]] = {}

    def begun(self) -> bool:
        """Whether the root was run."""
        return bool(self._rows)

    def frontier(self, budget: int, width: int, levels: int) -> list[int]:
        """The nodes to run next: the likeliest among the best `budget`; first of all the root."""
        if not self._rows:
            return [0] if budget > 0 and levels >= 0 else []
        return self._nodes.fresh(self._nodes.best(budget), width, levels)

    def reach(self, frontier: list[int]) -> float:
        """The chance that one of some nodes is reached."""
        return sum(self._nodes.chances[node] for node in frontier)

    def step(self, frontier: list[int], run: Run, judge: Judge) -> None:
        """One pass over all that was run and a frontier."""
        nodes = self._nodes
        logits = nodes.expand(frontier, run)
        tokens, scores = judge(logits, np.array([nodes.depths[n] for n in frontier], np.int32))
        for place, node in enumerate(frontier):
            self._rows[node] = tokens[place], scores[place]
            nodes.add(node, tokens[place].tolist(), scores[place].tolist())

    def growth(self, budget: int) -> GrownTree:
        """The root and the best `budget` nodes."""
        kept = [0, *self._nodes.best(budget)]
        index = {node: place for place, node in enumerate(kept)}
        rows = {index[node]: row for node, row in self._rows.items() if node in index}
        return GrownTree(self._nodes.tree(kept), rows)

    def below(self, tokens: Sequence[int]) -> GrowingTree | None:
        """The part below the path from the root that holds `tokens`; None where there is none."""
        nodes, root = self._nodes, 0
        for token in tokens:
            children = (n for n, parent in enumerate(nodes.parents) if parent == root)
            found = next((n for n in children if nodes.tokens[n] == token), None)
            if found is None:
                return None
            root = found
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
    """The likeliest nodes that a few passes find below the token `root`.

    Each pass runs the likeliest nodes, among the best `budget` so far, that were not run yet,
    together with those that were; EAGLE-2's growth (arXiv 2406.16858) with the best of all levels
    as candidates.
    """
    budget, width, most, levels, more = limits
    growing, passes = GrowingTree(root), 0
    frontier = growing.frontier(budget, width, levels)
    while frontier and passes < most:
        growing.step(frontier, run, judge)
        passes += 1
        frontier = growing.frontier(budget, width, levels)
        if not more(passes, growing.reach(frontier)):
            break
    return growing.growth(budget)


def sample(
    root: int, limits: GrowthLimits, run: Run, draw: Draw, ranks: Sequence[float]
) -> GrownTree:
    """A tree whose siblings are draws from the draft's own distribution, without replacement.

    The rejection walk needs them so: how many children a node has must not depend on them. The
    shape of the whole tree is settled before anything is drawn, best for `ranks`, the chances that
    the first, second, ... child is accepted if those before it are not (Sequoia, arXiv 2402.12374).
    Each pass runs a level. The rows of the result are the distributions.
    """
    budget, width, most, levels, more = limits
    nodes, shape = _Nodes(root), _shape(budget, width, min(most - 1, levels), ranks)
    rows: dict[int, tuple[Tokens, Floats]] = {}
    level, passes = [(0, 0)], 0  # nodes that have children, and their place in the shape
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
        if not more(passes, sum(nodes.chances[node] for node, _ in level)):
            break
    return GrownTree(nodes.tree(list(range(len(nodes.tokens)))), rows)


def _shape(budget: int, width: int, levels: int, ranks: Sequence[float]) -> list[list[int]]:
    """The children of each node of the tree that gains most, the root first."""
    shape: list[list[int]] = [[]]
    depths, chances = [0], [1.0]
    scores = _unconditional(ranks[:width])
    heap = [(-scores[0], 0)] if levels >= 0 else []  # minus the chance of the next child, parent
    while heap and len(shape) <= budget:
        chance, parent = heappop(heap)
        node = len(shape)
        shape[parent].append(node)
        shape.append([])
        depths.append(depths[parent] + 1)
        chances.append(-chance)
        if len(shape[parent]) < len(scores):
            heappush(heap, (-chances[parent] * scores[len(shape[parent])], parent))
        if depths[node] <= levels:
            heappush(heap, (chance * scores[0], node))
    return shape


def _unconditional(ranks: Sequence[float]) -> list[float]:
    """Chance of each child from its chance after those before it were refused."""
    scores, left = [], 1.0
    for rank in ranks:
        scores.append(left * rank)
        left *= 1.0 - rank
    return scores
