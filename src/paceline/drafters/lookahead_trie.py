"""Lookahead's trie: branches of prompts and outputs, whoever asked for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline import _native
from paceline.core import Exactness, Request, State, Tokens, TokenTree
from paceline.drafters.base import Drafter, DraftMethod, Target, single_origin_tree
from paceline.errors import MethodError
from paceline.registry import Source, check_range, drafters


@drafters.register("lookahead_trie", Exactness.EXACT, aliases=("trie",))
@dataclass(frozen=True)
class LookaheadTrie(DraftMethod):
    """Repeats what was said before, in this text or in earlier ones.

    Every run of `branch` tokens of every prompt and output is a branch of one trie, with counts.
    The last `branch - 1` tokens are looked up, then ever fewer of them; the longest that is known
    speaks first, its likeliest continuations are branches of the tree, and each is looked up again
    until the budget is full. What this text said counts `here` times more. When the trie is full,
    what was seen once goes and all counts are halved, as in the paper; the present text is spared
    where that suffices. How often a context of each length and frequency is right is learnt on the
    way, so that the scores are chances. The paper takes the branches of one match by frequency
    alone. What a request's last pass drew is not read.

    State: 12 bytes for each node in use and 4 floats for each length; carried across requests.
    Memory: `capacity` nodes of about 40 bytes. Cost of a proposal: 3 to 5 microseconds a node.
    Good for: services whose requests resemble each other (templates, retrieved passages, forms).

    Attributes:
        branch: tokens of the longest branch, its context included. Default 8, about the paper's.
        k: continuations of each context. Default 8.
        here: weight of this text's sightings above those of others. Default 1.
        rate: speed at which the chances are learnt. Default 0.02: about 50 tokens.
        capacity: nodes kept; a token takes up to `branch` of them. Default 262144.
    """

    source = Source(authors="Zhao et al.", title="Lookahead", arxiv="2312.12728")
    catalogue = (42,)

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
        """A drafter with an empty trie."""
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
        return arrays | {name: arrays[name][1:] for name in _NODES}  # the root says nothing

    def load(self, state: State) -> None:
        self._check(state)
        self._trie.load(*(state[name] for name in _NODES))
        self._trie.arrays()["reliability"][:] = state["reliability"]

    def reset(self) -> None:
        self._trie.reset()
        self._prompt = 0

    def _check(self, state: State) -> None:
        """Refuse a state of other settings, or one that is no trie over this vocabulary."""
        mine = self._trie.arrays()
        if state.keys() != mine.keys() or any(
            state[name].dtype != mine[name].dtype or state[name].ndim != 1 for name in mine
        ):
            raise MethodError("this state is not of a lookahead_trie; reset it")
        tokens, parents, counts = (state[name] for name in _NODES)
        n, chances = len(tokens), state["reliability"]
        if not len(parents) == len(counts) == n or chances.shape != mine["reliability"].shape:
            raise MethodError("this state is of a lookahead_trie with another `branch`; reset it")
        if n >= self._method.capacity:
            raise MethodError(
                f"this state has {n} nodes, more than lookahead_trie:capacity="
                f"{self._method.capacity}; raise it or reset the state"
            )
        impossible = MethodError("this state of lookahead_trie holds impossible branches; reset it")
        if not np.isfinite(counts).all() or (counts <= 0).any():
            raise impossible
        if not ((chances >= 0) & (chances <= 1)).all():
            raise impossible
        if ((tokens < 0) | (tokens >= self._vocab_size)).any():
            raise impossible
        if ((parents < 0) | (parents > np.arange(n))).any():
            raise impossible
        depths = np.zeros(n + 1, np.int32)
        for node, parent in enumerate(parents.tolist(), 1):
            depths[node] = depths[parent] + 1
        edges = parents.astype(np.int64) << 32 | tokens
        if depths.max() > self._method.branch or len(np.unique(edges)) < n:
            raise impossible


_NODES = ("tokens", "parents", "counts")
