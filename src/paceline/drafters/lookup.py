"""Prompt lookup: what followed the last tokens where they stood before, as a tree."""

from __future__ import annotations

from dataclasses import dataclass

from paceline import _native
from paceline.core import Exactness, Request, State, Tokens, TokenTree
from paceline.drafters.base import Drafter, DraftMethod, Target, single_origin_tree
from paceline.errors import MethodError
from paceline.registry import Source, check_range, drafters


@drafters.register("lookup", Exactness.EXACT)
@dataclass(frozen=True)
class Lookup(DraftMethod):
    """Copies from the prompt and the output.

    The last `longest` tokens are looked up in the text so far, then ever fewer of them. The
    longest match speaks first; its continuations, the recent and the frequent ones, are branches,
    and each branch is looked up again until the budget is full. How often a match of each length
    is right is learnt on the way, so that the scores are chances. The index takes `longest`
    entries a token as the text grows; nothing is searched.

    State: one float for each length; the index holds one text and is not carried. Memory:
    `capacity` rows of 16 + 8k bytes. Cost of a proposal: about a microsecond a node.
    Good for: summaries, editing, code, questions about a given text.

    Attributes:
        longest: tokens of the longest match. Default 4: longer ones are rarely righter.
        k: continuations kept for each match. Default 4.
        keep: share of the old when a continuation is seen again. Default 0.45: the most recent is
            always first, the others follow by frequency with the old ones fading.
        rate: speed at which the chance of each length is learnt. Default 0.02: about 50 tokens.
        capacity: matches kept, rounded up to a power of two; those unseen for longest give way.
            Default 32768: texts of 8000 tokens.
    """

    source = Source(authors="Saxena", title="Prompt Lookup Decoding, 2023")

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
        """A drafter with an empty index."""
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
        learnt, mine = state.get("reliability"), self._index.reliability()
        if learnt is None or learnt.shape != mine.shape or learnt.dtype != mine.dtype:
            raise MethodError("this state is not of a lookup with the same `longest`; reset it")
        if not ((learnt >= 0) & (learnt <= 1)).all():
            raise MethodError("this state of lookup holds chances outside 0..1; reset it")
        mine[:] = learnt

    def reset(self) -> None:
        self._index.reset()
        self._prompt = 0
