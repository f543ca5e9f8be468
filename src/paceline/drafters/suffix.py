"""Suffix automata: a tree of what followed the longest match in this text or earlier ones."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import numpy as np

from paceline import _native
from paceline.core import Exactness, Request, State, Tokens, TokenTree
from paceline.drafters.base import Drafter, DraftMethod, Target, single_origin_tree
from paceline.drafters.state import checked
from paceline.errors import MethodError
from paceline.registry import Source, check_range, drafters


@drafters.register("suffix", Exactness.EXACT)
@dataclass(frozen=True)
class Suffix(DraftMethod):
    """Copy what followed the longest match in everything read and written, by a suffix automaton.

    The automaton knows the longest suffix of the text that occurred anywhere before, with no limit
    to its length, and finds the next one in O(1) amortised as the text grows. Its continuations
    share, in proportion to their counts, the learnt probability that a match of such a length and
    count is right; the rest goes to the next shorter match, four in all. Every branch follows its
    own match, so the tree goes on where two earlier texts part.

    State: the tokens read, 4 bytes each, and 21 probabilities; carried across requests. Memory:
    about 150 bytes for each of at most `capacity` tokens. Cost of a proposal: about a microsecond a
    node.
    Good for: long repeats: code, forms, documents quoted at length, the same question again.

    Based on Hu et al., SAM Decoding, arXiv 2411.10666, and Blumer et al., 1985.

    Attributes:
        capacity: tokens kept. When the younger half is full the older one is forgotten. Default
            262144: some hundred requests.
        k: continuations of a match, the latest ones. Default 8.
        rate: learning rate of the probabilities, 0 to 1. Default 0.02: about 50 tokens.
    """

    source = Source(
        authors="Hu et al.",
        title="SAM Decoding",
        arxiv="2411.10666",
        note="automaton by Blumer et al., The smallest automaton recognizing the subwords of a "
        "text, 1985",
    )
    examples = ("suffix", "suffix:capacity=8,k=1")

    capacity: int = 1 << 18
    k: int = 8
    rate: float = 0.02

    def __post_init__(self) -> None:
        check_range(2, 1 << 26, "suffix", capacity=self.capacity)
        check_range(1, 64, "suffix", k=self.k)
        check_range(0.0, 1.0, "suffix", rate=self.rate)

    def build(self, target: Target) -> Drafter:
        """Return a drafter that has read nothing yet."""
        return _Suffix(self, target.vocab_size)


class _Suffix(Drafter):
    origins = ("suffix",)

    def __init__(self, method: Suffix, vocab_size: int) -> None:
        self._automata = _native.SuffixMatcher(method.capacity, method.k, method.rate)
        self._vocab_size = vocab_size
        self._capacity = method.capacity
        self._prompt = 0

    def fork(self) -> Drafter:
        other = copy(self)
        other._automata = self._automata.fork()
        return other

    def begin(self, request: Request) -> None:
        self._automata.begin()
        self._prompt = len(request.prompt)

    def propose(self, context: Tokens, budget: int, min_path_prob: float = 0.0) -> TokenTree:
        self._automata.extend(context, self._prompt)
        return single_origin_tree(*self._automata.propose(context, budget, min_path_prob))

    def state(self) -> State:
        return automata_state(self._automata)

    def load(self, state: State) -> None:
        load_automata(self._automata, state, self._capacity, self._vocab_size)

    def reset(self) -> None:
        self._automata.reset()


def automata_state(automata: _native.SuffixMatcher) -> State:
    """Return what the automata read, where the younger one begins, and learnt probabilities."""
    return {
        "read": automata.read(),
        "aged": np.array([automata.aged], np.int64),
        "reliability": automata.reliability().copy(),
    }


def load_automata(
    automata: _native.SuffixMatcher, state: State, capacity: int, vocab_size: int
) -> None:
    """Read again what `automata_state` returned.

    Raises:
        MethodError: the state is of something else, of another vocabulary or a larger capacity.
    """
    ranges = {"read": (-1, vocab_size - 1), "reliability": (0, 1)}
    checked("suffix", state, automata_state(automata), ranges, rows=("read",))
    read, split = state["read"], int(state["aged"][0])
    sizes = (int((part >= 0).sum()) for part in (read[:split], read[split:]))
    if not 0 <= split <= len(read) or max(sizes) > max(capacity // 2, 1):
        raise MethodError("this state of suffix was kept with a larger capacity; reset it")
    automata.replay(read, split)
    automata.reliability()[:] = state["reliability"]
