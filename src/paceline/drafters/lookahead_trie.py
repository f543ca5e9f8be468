"""The trie of Lookahead (PIA): branches of the prompts and outputs of all requests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline import _native
from paceline.core import Exactness, Request, State, Tokens, TokenTree
from paceline.drafters.base import Drafter, DraftMethod, Target, single_origin_tree
from paceline.drafters.state import checked
from paceline.errors import MethodError
from paceline.registry import Source, check_range, drafters


@drafters.register("lookahead_trie", Exactness.EXACT, aliases=("trie",))
@dataclass(frozen=True)
class LookaheadTrie(DraftMethod):
    """Repeat what was read or written before, in this text or in earlier ones.

    Every run of `branch` tokens of every prompt and output is a branch of one trie, with counts.
    The last `branch - 1` tokens are looked up, then fewer and fewer of them. The longest that is
    known comes first, its most likely continuations are branches of the tree, and each is looked up
    again until the budget is full. Counts of this text weigh `here` times more. When the trie is
    full, what was seen once is dropped and all counts are halved, as in the paper; the present text
    is spared where that suffices. How often a context of each length and frequency is right is
    learnt, so that scores are probabilities. The tokens of a request's last pass are not read.

    State: 12 bytes for each node in use and 4 floats for each length; carried across requests.
    Memory: `capacity` nodes of about 40 bytes. Cost of a proposal: 3 to 5 microseconds a node.
    Good for: services whose requests resemble each other (templates, retrieved passages, forms).

    Based on Zhao et al., Lookahead, arXiv 2312.12728.

    Attributes:
        branch: tokens of the longest branch, its context included. Default 8, about the paper's.
        k: continuations of each context. Default 8.
        here: weight of this text's counts above those of others. Default 1.
        rate: learning rate of the probabilities, 0 to 1. Default 0.02: about 50 tokens.
        capacity: nodes kept; a token takes up to `branch` of them. Default 262144.
    """

    source = Source(
        authors="Zhao et al.",
        title="Lookahead",
        arxiv="2312.12728",
        note="the paper takes the branches of one match by frequency alone",
    )
    catalogue = (42,)
    examples = ("lookahead_trie", "lookahead_trie:branch=2,k=1,here=0,capacity=256")

    branch: int = 8
    k: int = 8
    here: float = 1.0
    rate: float = 0.02
    capacity: int = 1 << 18

    def __post_init__(self) -> None:
        check_range(2, 64, "lookahead_trie", branch=self.branch)
        check_range(1, 64, "lookahead_trie", k=self.k)
        check_range(0.0, 1e6, "lookahead_trie", here=self.here)
        check_range(0.0, 1.0, "lookahead_trie", rate=self.rate)
        check_range(256, 1 << 28, "lookahead_trie", capacity=self.capacity)

    def build(self, target: Target) -> Drafter:
        """Return a drafter with an empty trie."""
        return _LookaheadTrie(self, target.vocab_size)


class _LookaheadTrie(Drafter):
    origins = ("lookahead_trie",)

    def __init__(self, method: LookaheadTrie, vocab_size: int) -> None:
        self._method = method
        self._vocab_size = vocab_size
        self._trie = _native.TokenTrie(
            method.branch, method.k, method.capacity, method.here, method.rate
        )
        self._prompt = 0

    def begin(self, request: Request) -> None:
        self._trie.begin()
        self._prompt = len(request.prompt)

    def propose(self, context: Tokens, budget: int, min_path_prob: float = 0.0) -> TokenTree:
        self._trie.extend(context, self._prompt)
        return single_origin_tree(*self._trie.propose(context, budget))

    def state(self) -> State:
        arrays = {name: array.copy() for name, array in self._trie.arrays().items()}
        return arrays | {name: arrays[name][1:] for name in _NODES}  # all but the root

    def load(self, state: State) -> None:
        self._check(state)
        self._trie.load(*(state[name] for name in _NODES))
        self._trie.arrays()["reliability"][:] = state["reliability"]

    def reset(self) -> None:
        self._trie.reset()
        self._prompt = 0

    def _check(self, state: State) -> None:
        """Refuse a state of other settings, or one that is no trie over this vocabulary."""
        ranges = {
            "tokens": (0, self._vocab_size - 1),
            "counts": (float(np.finfo(np.float32).tiny), np.inf),
            "reliability": (0, 1),
        }
        checked("lookahead_trie", state, self._trie.arrays(), ranges, rows=_NODES)
        tokens, parents = state["tokens"], state["parents"]
        n = len(tokens)
        if n >= self._method.capacity:
            raise MethodError(
                f"this state has {n} nodes, more than lookahead_trie:capacity="
                f"{self._method.capacity}; raise it or reset the state"
            )
        impossible = MethodError("this state of lookahead_trie holds impossible branches; reset it")
        if ((parents < 0) | (parents > np.arange(n))).any():
            raise impossible
        depths = np.zeros(n + 1, np.int32)
        for node, parent in enumerate(parents.tolist(), 1):
            depths[node] = depths[parent] + 1
        edges = parents.astype(np.int64) << 32 | tokens
        if depths.max() > self._method.branch or len(np.unique(edges)) < n:
            raise impossible


_NODES = ("tokens", "parents", "counts")
