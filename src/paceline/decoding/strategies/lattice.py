"""Lattice search: best-first search that merges hypotheses with the same recent tokens."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

import numpy as np
from numpy.typing import NDArray

from paceline.core import Exactness
from paceline.decoding.strategies.base import SearchOutput, Strategy, Task
from paceline.decoding.strategies.hypotheses.scores import best, dead_end
from paceline.decoding.strategies.hypotheses.search import Search
from paceline.registry import Source, check_range, strategies


@strategies.register("lattice", Exactness.LOSSY)
@dataclass(frozen=True)
class LatticeSearch(Strategy):
    """Complete the best open branch greedily, and merge branches with the same recent tokens.

    The open branch with the best mean log-probability is completed greedily; other likely tokens on
    the way stay open. No branch is pruned while nodes are left to spend. A branch whose last
    `suffix` tokens are those of a node that was run already, at the same depth or up to `stretch`
    deeper, joins it and costs no pass: the lattice then contains every beginning with every end.
    Nodes after a join keep the probabilities of the context that came first, so the score of a
    joined path, its mean log-probability, is an estimate. The paper also merges in the other
    direction, and backwards.

    Cost: `nodes` nodes, `width` of them a pass, and the rows of a branch that is resumed.
    Memory: `width` caches; a list of tokens for each open branch.
    Good for: thousands of variants of one answer, to choose from by other means.

    Attributes:
        nodes: number of nodes to run, 1 to 1000000. Default 512.
        width: branches that are completed in parallel, 1 to 256. Default 4.
        top: number of successors of a node that stay open, 1 to 256. Default 5.
        least: their minimum probability, 0 to 1. Default 0.05.
        suffix: number of last tokens that must agree, 1 to 64. Default 4, the paper's.
        stretch: by how many tokens the joined node may be deeper. Default 4.
        returned: outputs given. Default 4.
    """

    nodes: int = 512
    width: int = 4
    top: int = 5
    least: float = 0.05
    suffix: int = 4
    stretch: int = 4
    returned: int = 4

    examples = ("lattice:nodes=30,width=3",)
    source = Source(
        authors="Xu et al.",
        title="Massive-scale Decoding for Text Generation using Lattices",
        arxiv="2112.07660",
    )
    catalogue = (173,)
    missing = {173: "merges of shorter with longer paths, and zipping backwards"}
    revisits = True

    def __post_init__(self) -> None:
        check_range(1, 1_000_000, self.name, nodes=self.nodes)
        check_range(1, 256, self.name, width=self.width, top=self.top)
        check_range(0, 1, self.name, least=self.least)
        check_range(1, 64, self.name, suffix=self.suffix)
        check_range(0, 4096, self.name, stretch=self.stretch)
        check_range(1, 4096, self.name, returned=self.returned)

    def run(self, task: Task) -> list[SearchOutput]:
        """Return the best `returned` paths; if none is complete, the longest beginning."""
        self.check(task)
        search = Search(task)
        lattice = Lattice(self, task)
        with search:
            lattice.search(search)
        paths = lattice.best(self.returned)
        if not paths:  # Ctrl-C, or too few nodes
            node = max(lattice.nodes, key=lambda node: len(node.tokens))
            if not node.tokens and not search.interrupted:
                raise dead_end(len(task.request.prompt))
            paths = [(list(node.tokens), node.score / max(len(node.tokens), 1), False)]
        return [search.output(tokens, score, ended) for tokens, score, ended in paths]


@dataclass(slots=True, eq=False)
class LatticeNode:
    """A point of the lattice, after one token.

    Attributes:
        tokens: new tokens of the first path to it.
        score: total log-probability of that path.
        into: nodes before this one, and the log-probability of the step from each.
        end: why a text ends here: `stop` or `limit`; empty if none does.
    """

    tokens: tuple[int, ...]
    score: float
    into: list[tuple[LatticeNode, float]] = field(default_factory=list)
    end: str = ""


class Lattice:
    """Nodes and the steps between them; every step leads to a greater depth."""

    def __init__(self, settings: LatticeSearch, task: Task) -> None:
        self._settings, self._task = settings, task
        self.root = LatticeNode((), 0.0)
        self.nodes = [self.root]
        self.merged = 0
        self._known: dict[tuple[int, ...], list[LatticeNode]] = {}
        self._open: list[tuple[float, int, LatticeNode, int, float]] = []
        self._serial = count()

    def search(self, search: Search) -> None:
        """Run nodes until all are spent, or nothing is open."""
        first = search.start()
        spent, most = 0, self._settings.nodes
        cursors = [
            first,
            *(search.fork(first, first.history) for _ in range(self._settings.width - 1)),
        ]
        at: dict[int, LatticeNode] = {id(first): self.root}
        while spent < most:
            for cursor in cursors[: most - spent]:
                if id(cursor) not in at and (node := self._take()):
                    at[id(cursor)] = node
            live = [cursor for cursor in cursors if id(cursor) in at][: most - spent]
            if not live:
                return
            for cursor in live:
                search.move(cursor, [*self._task.request.prompt, *at[id(cursor)].tokens])
            rows = search.log_probs(live)
            spent += len(live)
            for row, cursor in zip(rows, live, strict=True):
                search.engine.commit(cursor.sequence, [0])
                node = self._expand(at.pop(id(cursor)), row)
                if node is not None:
                    at[id(cursor)] = node

    def _take(self) -> LatticeNode | None:
        """Pop the best open step that leads to a new node, and return the node."""
        while self._open:
            _, _, parent, token, log_prob = heapq.heappop(self._open)
            node = self._step(parent, token, log_prob)
            if node is not None:
                return node
        return None

    def _expand(self, node: LatticeNode, log_probs: NDArray[np.float64]) -> LatticeNode | None:
        """Open the successors of `node`; return the most likely one if it is a new node."""
        tokens = best(log_probs, self._settings.top)
        floor = np.log(self._settings.least) if self._settings.least else -np.inf
        for token in tokens[1:]:
            if log_probs[token] >= floor:
                self._wait(node, int(token), float(log_probs[token]))
        if not len(tokens):
            return None
        return self._step(node, int(tokens[0]), float(log_probs[tokens[0]]))

    def _wait(self, parent: LatticeNode, token: int, log_prob: float) -> None:
        mean = (parent.score + log_prob) / (len(parent.tokens) + 1)
        heapq.heappush(self._open, (-mean, next(self._serial), parent, token, log_prob))

    def _step(self, parent: LatticeNode, token: int, log_prob: float) -> LatticeNode | None:
        """Return the node after a step; None if it ends a text or joins another, and is not run."""
        tokens = (*parent.tokens, token)
        twin = self._twin(tokens)
        if twin is not None:
            twin.into.append((parent, log_prob))
            self.merged += 1
            return None
        node = LatticeNode(tokens, parent.score + log_prob, [(parent, log_prob)])
        if self._task.ends(tokens):
            node.end = "stop"
        elif len(tokens) >= self._task.limit:
            node.end = "limit"
        self.nodes.append(node)
        if len(tokens) >= self._settings.suffix:
            self._known.setdefault(tokens[-self._settings.suffix :], []).append(node)
        return None if node.end else node

    def _twin(self, tokens: tuple[int, ...]) -> LatticeNode | None:
        """Return the node that a path with these new tokens joins, or None."""
        depth = len(tokens)
        for node in self._known.get(tokens[-self._settings.suffix :], ()):
            deeper = len(node.tokens) - depth
            if 0 <= deeper <= self._settings.stretch and node.end != "limit":
                return node
        return None

    def count(self) -> int:
        """Return the number of complete texts in the lattice."""
        ways = {id(self.root): 1}
        for node in self._in_order():
            ways[id(node)] = sum(ways[id(parent)] for parent, _ in node.into)
        return sum(ways[id(node)] for node in self.nodes if node.end)

    def best(self, number: int) -> list[tuple[list[int], float, bool]]:
        """Return tokens, mean log-probability and whether stopped, of the best complete texts.

        At each node the `number` best paths to it are kept, by their mean.
        """
        ways: dict[int, list[tuple[float, tuple[int, ...]]]] = {id(self.root): [(0.0, ())]}
        whole: list[tuple[list[int], float, bool]] = []
        for node in self._in_order():
            reached = {
                (*tokens, node.tokens[-1]): score + log_prob
                for parent, log_prob in node.into
                for score, tokens in ways[id(parent)]
            }
            ranked = sorted(((s, t) for t, s in reached.items()), key=lambda way: _rank(*way))
            ways[id(node)] = ranked[:number]
            if node.end:
                stopped = node.end == "stop"
                whole += [(list(t), s / len(t), stopped) for s, t in ranked[:number]]
        whole.sort(key=lambda text: (-text[1], text[0]))
        return whole[:number]

    def _in_order(self) -> Iterator[LatticeNode]:
        """Iterate over all nodes but the root, parents first."""
        return iter(sorted(self.nodes[1:], key=lambda node: len(node.tokens)))


def _rank(score: float, tokens: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
    """Return a sort key that puts the best mean first."""
    return -score / len(tokens), tokens
