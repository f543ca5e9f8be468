"""Prompt lookup: a tree of what followed the last tokens where they occurred before."""

from __future__ import annotations

from dataclasses import dataclass

from paceline import _native
from paceline.core import Exactness, Request, State, Tokens, TokenTree
from paceline.drafters.base import Drafter, DraftMethod, Target, single_origin_tree
from paceline.drafters.state import checked
from paceline.registry import Source, check_range, drafters


@drafters.register("lookup", Exactness.EXACT)
@dataclass(frozen=True)
class Lookup(DraftMethod):
    """Copy what followed the last tokens where they occurred before, in the prompt or the output.

    The last `longest` tokens are looked up in the text so far, then fewer and fewer of them. The
    longest match comes first; its continuations, the recent and the frequent ones, are branches,
    and each branch is looked up again until the budget is full. How often a match of each length
    is right is learnt, so that scores are probabilities. The index gets `longest` entries a token
    as the text grows; nothing is searched.

    State: one float for each length; the index holds one text and is not carried. Memory:
    `capacity` rows of 16 + 8k bytes. Cost of a proposal: about a microsecond a node.
    Good for: summaries, editing, code, questions about a given text.

    Based on Saxena, Prompt Lookup Decoding, 2023, with trees for its one chain.

    Attributes:
        longest: tokens of the longest match. Default 4: longer ones are rarely right more often.
        k: continuations kept for each match. Default 4.
        keep: weight of the old, 0 to 1, when a continuation occurs again. Default 0.45: the most
            recent is always first, the others follow by frequency, with the old ones fading.
        rate: learning rate of the probability of each length, 0 to 1. Default 0.02: about 50
            tokens.
        capacity: matches kept, rounded up to a power of two; the least recently seen are replaced.
            Default 32768: texts of 8000 tokens.
    """

    source = Source(authors="Saxena", title="Prompt Lookup Decoding, 2023")
    examples = ("lookup", "lookup:longest=1,k=1,capacity=8")

    longest: int = 4
    k: int = 4
    keep: float = 0.45
    rate: float = 0.02
    capacity: int = 1 << 15

    def __post_init__(self) -> None:
        check_range(1, 64, "lookup", longest=self.longest, k=self.k)
        check_range(0.0, 1.0, "lookup", keep=self.keep, rate=self.rate)
        check_range(8, 1 << 28, "lookup", capacity=self.capacity)

    def build(self, target: Target) -> Drafter:
        """Return a drafter with an empty index."""
        return _Lookup(self)


class _Lookup(Drafter):
    origins = ("lookup",)

    def __init__(self, method: Lookup) -> None:
        self._index = _native.NgramIndex(
            method.longest, method.k, method.capacity, method.keep, method.rate
        )
        self._prompt = 0

    def begin(self, request: Request) -> None:
        self._index.begin()
        self._prompt = len(request.prompt)

    def propose(self, context: Tokens, budget: int, min_path_prob: float = 0.0) -> TokenTree:
        self._index.extend(context, self._prompt)
        return single_origin_tree(*self._index.propose(context, budget, min_path_prob))

    def state(self) -> State:
        return {"reliability": self._index.reliability().copy()}

    def load(self, state: State) -> None:
        checked("lookup", state, self.state(), {"reliability": (0, 1)})
        self._index.reliability()[:] = state["reliability"]

    def reset(self) -> None:
        self._index.reset()
        self._prompt = 0
