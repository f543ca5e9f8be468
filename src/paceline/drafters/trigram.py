"""ADED: tri-grams of what the model said, and a search that also tries the less likely."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline import _native
from paceline.core import Exactness, Request, State, Step, Tokens, TokenTree
from paceline.drafters.base import Drafter, DraftMethod, Target, single_origin_tree, step_arrays
from paceline.errors import MethodError
from paceline.registry import Source, check_range, drafters


@drafters.register("trigram", Exactness.EXACT)
@dataclass(frozen=True)
class Trigram(DraftMethod):
    """Two tokens say what comes third, and a tree search says which guesses to try.

    The likeliest successors at every node of every pass, rejected ones included, move the row of
    the two tokens that end there. The tree is grown by simulations in the manner of Monte Carlo
    tree search: each steps down to the child with the best mean value plus a bonus (PUCT) for what
    is likely and was seldom visited, and ends with a new node. A visit's value is the number of
    tokens that the branch is expected to add. Scores are not the rows' chances but how often
    successors of such a rank and chance were drawn, which is learnt.

    The baseline for recycle's contexts of several orders. Unlike the paper's, its tri-grams start
    empty and not from a corpus, and are bounded; the value of a visit and the scores are ours.

    State: `capacity` rows of 16 + 8k bytes and 40 floats; carried across requests. Cost of a
    proposal: 3 to 4 microseconds a node.
    Good for: comparison; short habits of the model, at the least memory.

    Attributes:
        k: successors kept for two tokens. Default 8.
        explore: weight of the bonus; 0 follows what is likeliest. Default 1.
        depth: of the longest branch. Default 16.
        keep: share of the old when two tokens are observed again. Default 0.6.
        rate: speed at which the chances are learnt. Default 0.02: about 50 tokens.
        capacity: rows kept, rounded up to a power of two; those unseen for longest give way.
            Default 65536.
    """

    source = Source(authors="Liu et al.", title="Adaptive Draft-Verification", arxiv="2407.12021")
    catalogue = (354,)

    k: int = 8
    explore: float = 1.0
    depth: int = 16
    keep: float = 0.6
    rate: float = 0.02
    capacity: int = 1 << 16

    def __post_init__(self) -> None:
        check_range(1, 32, "trigram", k=self.k)
        check_range(0.0, 100.0, "trigram", explore=self.explore)
        check_range(1, 256, "trigram", depth=self.depth)
        check_range(0.0, 1.0, "trigram", keep=self.keep, rate=self.rate)
        check_range(8, 1 << 26, "trigram", capacity=self.capacity)

    def build(self, target: Target) -> Drafter:
        """A drafter that has observed nothing yet."""
        return _Trigram(self, target.vocab_size)


class _Trigram(Drafter):
    origins = ("trigram",)
    learns_from_prompt = True

    def __init__(self, method: Trigram, vocab_size: int) -> None:
        self.top_k = min(method.k, vocab_size)
        self._method = method
        self._vocab_size = vocab_size
        self._native = _native.TrigramSearch(
            method.k, method.capacity, method.explore, method.depth, method.keep, method.rate
        )
        self._prompt = 0

    def begin(self, request: Request) -> None:
        self._prompt = len(request.prompt)

    def propose(self, context: Tokens, budget: int, min_path_prob: float = 0.0) -> TokenTree:
        return single_origin_tree(*self._native.propose(context, budget))

    def observe(self, step: Step) -> None:
        drawn = len(step.context) >= self._prompt  # the prompt's own tokens were not
        self._native.observe(*step_arrays(step), drawn)

    def state(self) -> State:
        arrays = self._arrays()
        used = np.flatnonzero(arrays["keys"])
        state = {name: arrays[name][used] for name in _ROWS}
        state["reliability"] = arrays["reliability"].copy()
        return state | {"rows": used, "clock": np.array([self._native.clock], np.uint32)}

    def load(self, state: State) -> None:
        arrays = self._arrays()
        self._check(state, arrays)
        self.reset()
        for name in _ROWS:
            arrays[name][state["rows"]] = state[name]
        arrays["reliability"][:] = state["reliability"]
        self._native.clock = int(state["clock"][0])

    def reset(self) -> None:
        self._native.reset()

    def _arrays(self) -> State:
        arrays = self._native.arrays()
        wide = {name: arrays[name].reshape(-1, self._method.k) for name in ("tokens", "probs")}
        return arrays | wide

    def _check(self, state: State, mine: State) -> None:
        """Refuse a state that this table cannot hold, or that could guess impossible tokens."""
        other = MethodError("this state is of a trigram with other settings; reset it")
        if state.keys() != {*mine, "rows", "clock"}:
            raise other
        rows, clock = state["rows"], state["clock"]
        if rows.dtype != np.int64 or rows.ndim != 1 or clock.dtype != np.uint32:
            raise other
        for name, array in mine.items():
            length = len(rows) if name in _ROWS else len(array)
            if state[name].dtype != array.dtype or state[name].shape != (length, *array.shape[1:]):
                raise other
        ordered = (np.diff(rows) > 0).all()
        if clock.shape != (1,) or not ordered or (len(rows) and rows[0] < 0):
            raise other
        if len(rows) and rows[-1] >= len(mine["keys"]):
            raise other
        tokens, chances = np.sort(state["tokens"], axis=1), state["reliability"]
        twice = (tokens[:, 1:] == tokens[:, :-1]) & (tokens[:, 1:] >= 0)
        possible = (tokens >= -1) & (tokens < self._vocab_size)
        learnt = ((chances >= 0) & (chances <= 1)).all()
        if twice.any() or not possible.all() or not np.isfinite(state["probs"]).all() or not learnt:
            raise MethodError("this state of trigram holds impossible successors; reset it")


_ROWS = ("keys", "counts", "written", "tokens", "probs")
