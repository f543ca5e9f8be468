"""Lookahead decoding: the model refines guesses, pass by pass, into n-grams."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paceline.core import Exactness, Floats, Request, State, Step, Tokens, TokenTree
from paceline.drafters.base import Drafter, DraftMethod, Target, single_origin_tree
from paceline.drafters.state import checked
from paceline.registry import Source, check_range, drafters


@drafters.register("lookahead", Exactness.EXACT, aliases=("jacobi",))
@dataclass(frozen=True)
class Lookahead(DraftMethod):
    """Run guesses further ahead in every pass, and replace them by what the model predicts.

    A part of the tree is a chain of guesses for the next `window` tokens. The model's most likely
    token after each of them becomes the chain of the next pass (Jacobi's iteration: its fixed point
    is greedy decoding). Read across passes, token i of one chain, i + 1 of the next and so on form
    n-grams, which a pool keeps; those that begin with the last token are the tree's other branches.
    How often branches and chain are right at each depth is learnt, so that scores are
    probabilities.

    All guesses are in one token tree. So a guess sees the whole chain before it, where the paper's
    mask lets it see its own trajectory of n - 1 passes, and the chain is verified like any branch.
    New guesses at the chain's end are tokens of the context, where the paper takes random ones.

    State: the pool, 4n bytes an n-gram, and 64 floats; carried across requests. Memory: the pool as
    Python tuples, some 500 bytes an n-gram. Cost of a proposal: 5 microseconds a node, and as much
    to learn from it.
    Good for: comparison; text that resembles nothing seen before, on machines where nodes cost
    nothing. A governor that sizes the tree cuts the chain, which is seldom right.

    Based on Fu et al., Break the Sequential Dependency, arXiv 2402.02057.

    Attributes:
        window: guesses of the chain. Default 16, about the paper's 15.
        n: tokens of an n-gram. Default 4: longer ones are rarely completed.
        verified: n-grams kept for each first token, the recent ones. Default 15, the paper's.
        share: the chain's part of the budget, 0 to 1. Default 0.5, the paper's.
        rate: learning rate of the probabilities, 0 to 1. Default 0.02: about 50 tokens.
        capacity: n-grams in the pool; the least recently seen are replaced. Default 16384.
    """

    source = Source(
        authors="Fu et al.",
        title="Break the Sequential Dependency",
        arxiv="2402.02057",
        note="all guesses are in one token tree, without the paper's mask",
    )
    examples = ("lookahead", "lookahead:window=1,n=2,verified=1,share=0.9,capacity=4")

    window: int = 16
    n: int = 4
    verified: int = 15
    share: float = 0.5
    rate: float = 0.02
    capacity: int = 1 << 14

    def __post_init__(self) -> None:
        check_range(1, 256, "lookahead", window=self.window)
        check_range(2, 32, "lookahead", n=self.n)
        check_range(1, 256, "lookahead", verified=self.verified)
        check_range(0.0, 1.0, "lookahead", share=self.share, rate=self.rate)
        check_range(1, 1 << 24, "lookahead", capacity=self.capacity)

    def build(self, target: Target) -> Drafter:
        """Return a drafter with an empty pool."""
        return _Lookahead(self, target.vocab_size)


Gram = tuple[int, ...]

_DEPTHS, _RANKS = 8, 4


class _Pool:
    """N-grams by their first token, the latest last; bounded for each token and in all."""

    def __init__(self, each: int, capacity: int) -> None:
        self._each, self._capacity = each, capacity
        self.all: OrderedDict[Gram, None] = OrderedDict()
        self._by_first: dict[int, OrderedDict[Gram, None]] = {}

    def add(self, gram: Gram) -> None:
        mine = self._by_first.setdefault(gram[0], OrderedDict())
        for kept in (mine, self.all):
            kept[gram] = None
            kept.move_to_end(gram)
        if len(mine) > self._each:
            del self.all[mine.popitem(last=False)[0]]
        if len(self.all) > self._capacity:
            oldest, _ = self.all.popitem(last=False)
            others = self._by_first[oldest[0]]
            del others[oldest]
            if not others:
                del self._by_first[oldest[0]]

    def after(self, token: int) -> list[Gram]:
        """Return what follows `token`, the latest first."""
        return [gram[1:] for gram in reversed(self._by_first.get(token, ()))]


class _Lookahead(Drafter):
    origins = ("lookahead",)
    top_k = 1

    def __init__(self, method: Lookahead, vocab_size: int) -> None:
        self._method = method
        self._vocab_size = vocab_size
        self.reset()

    def reset(self) -> None:
        self._pool = _Pool(self._method.verified, self._method.capacity)
        doubt = np.linspace(0.7, 0.5, _DEPTHS, dtype=np.float32)[:, None]
        self._probs = np.empty((2, _DEPTHS, _RANKS), np.float32)  # [chain or n-grams, depth, rank]
        self._probs[0], self._probs[1] = 0.1, (1 - doubt) / np.arange(1, _RANKS + 1)
        self._forget_text()

    def _forget_text(self) -> None:
        # Rows of the last passes: position of the first token, and the most likely tokens.
        self._rows: deque[tuple[int, Gram]] = deque(maxlen=self._method.n)
        self._edges: dict[tuple[int, int], int] = {}  # parent and token to node
        self._cells: list[tuple[int, int, int]] = [(0, 0, 0)]
        self._chain: list[int] = []

    def begin(self, request: Request) -> None:
        self._forget_text()
        n = self._method.n
        for start in range(len(request.prompt) - n + 1):
            self._pool.add(request.prompt[start : start + n])

    def propose(self, context: Tokens, budget: int, min_path_prob: float = 0.0) -> TokenTree:
        root, depths = int(context[-1]), [0]
        tokens, parents = [root], [-1]
        self._edges, self._cells = {}, [(0, 0, 0)]

        def add(path: Sequence[int], source: int, rank: int, limit: int) -> None:
            node = 0
            for token in path:
                child = self._edges.get((node, token))
                if child is None:
                    if len(tokens) > limit:
                        return
                    child = self._edges[node, token] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
                    depths.append(depths[node] + 1)
                    depth = min(depths[child], _DEPTHS) - 1
                    self._cells.append((source, depth, min(rank, _RANKS - 1)))
                node = child

        self._chain = self._next_chain(context)
        grams = self._pool.after(root)
        chained = int(self._method.share * budget)
        for rank, gram in enumerate(grams):
            add(gram, 1, rank, budget - chained)
        add(self._chain, 0, 0, budget)
        for rank, gram in enumerate(grams):
            add(gram, 1, rank, budget)
        above = np.array(parents, np.int32)
        return single_origin_tree(np.array(tokens, np.int32), above, self._scores(above))

    def _next_chain(self, context: Tokens) -> list[int]:
        """Return what the last pass predicted from here on, then tokens of the context."""
        size, chain = len(context), []
        if self._rows:
            start, row = self._rows[-1]
            chain = list(row[size - start :]) if size >= start else []
        for position in range(size + len(chain), size + self._method.window):
            chain.append(int(context[position * 2654435761 % size]))
        return chain[: self._method.window]

    def _scores(self, parents: Tokens) -> Floats:
        """Return the learnt probability of each node; those of siblings add up to 1 at most."""
        scores: Floats = self._probs[tuple(np.array(self._cells).T)]
        scores[0] = 1.0
        sums = np.bincount(parents[1:], scores[1:], minlength=len(parents))
        scores[1:] /= np.maximum(sums[parents[1:]], 1.0)
        return scores.clip(0.0, 1.0)

    def observe(self, step: Step) -> None:
        tree, top = step.tree, step.top_tokens[:, 0].tolist()
        # The tree may have lost nodes since it was proposed.
        known, nodes = {0: 0}, [0]
        for node in range(1, len(tree)):
            parent = nodes[tree.parents[node]]
            nodes.append(self._edges.get((parent, int(tree.tokens[node])), -1))
            known[nodes[-1]] = node
        self._learn(step, nodes)
        row, at = [top[0]], 0
        for token in self._chain:
            at = self._edges.get((at, token), -1)
            if at not in known or at < 0:
                break
            row.append(top[known[at]])
        self._rows.append((len(step.context), tuple(row)))
        self._collect()

    def _learn(self, step: Step, nodes: list[int]) -> None:
        drawn = dict(zip(step.path.tolist(), step.drawn.tolist(), strict=True))
        for node in range(1, len(step.tree)):
            parent = int(step.tree.parents[node])
            if parent in drawn and nodes[node] > 0:
                cell = self._cells[nodes[node]]
                hit = drawn[parent] == step.tree.tokens[node]
                self._probs[cell] += self._method.rate * (hit - self._probs[cell])

    def _collect(self) -> None:
        """Add the n-grams that end in the last row to the pool."""
        rows = list(self._rows)
        if len(rows) < self._method.n:
            return
        start, row = rows[-1]
        for end in range(start, start + len(row)):
            first = end - self._method.n + 1
            gram = []
            for offset, (begin, tokens) in enumerate(rows):
                place = first + offset - begin
                if not 0 <= place < len(tokens):
                    break
                gram.append(tokens[place])
            else:
                self._pool.add(tuple(gram))

    def state(self) -> State:
        grams = np.array(list(self._pool.all), np.int32).reshape(-1, self._method.n)
        return {"grams": grams, "chances": self._probs.copy()}

    def load(self, state: State) -> None:
        ranges = {"grams": (0, self._vocab_size - 1), "chances": (0, 1)}
        checked("lookahead", state, self.state(), ranges, rows=("grams",))
        self.reset()
        for gram in state["grams"].tolist():
            self._pool.add(tuple(gram))
        self._probs = state["chances"].copy()
