"""Recycling: what the model thought after like contexts is the guess of what it thinks next."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, fields

import numpy as np

from paceline import _native
from paceline.core import Exactness, Request, State, Step, Tokens, TokenTree
from paceline.drafters.base import Drafter, DraftMethod, Target, single_origin_tree, step_arrays
from paceline.drafters.history.warm_start import start_of
from paceline.drafters.token_recycling import TokenRecycling
from paceline.errors import MethodError
from paceline.registry import Source, check_range, drafters

_TREES = ("best", "static", "paper")


@drafters.register("recycle", Exactness.EXACT)
@dataclass(frozen=True)
class Recycle(DraftMethod):
    """Predict the next token from the model's own top-k predictions in similar contexts; ours.

    Every pass computes a distribution at every node, rejected nodes and the prompt included. Their
    top k are kept by context: the last 1 to `orders` tokens, the one token 2 to `skips + 1`
    positions back, and the empty context. The row of a context is a running average of the
    distributions observed there. To predict, the rows of all contexts that match are mixed: the
    probability of a token is the softmax of the rows' weighted log probabilities, plus a weight
    where the token is a row's first. The weights depend on the longest matching context and on how
    often each context was observed, and learn from every drawn token, so that scores are
    probabilities at the request's temperature. The tree grows best-first by path probability until
    the budget is full.

    State: `capacity` rows of 16 + 8k bytes and a thousand weights; carried across requests. Cost
    of a proposal: some 2 microseconds a node.
    Good for: everything, above all text with recurring turns, and the more the longer it runs.

    Developed from Token Recycling, which is `token_recycling`.

    Attributes:
        tree: `best`, as above. `paper` and `static` are deprecated names of `token_recycling` and
            `token_recycling:tree=static`, without other settings; they go with the next release.
        orders: tokens of the longest context. Default 8: longer ones are rarely seen again.
        skips: contexts of a single token further back, which still match where a new word stands
            between. Default 2.
        k: successors kept for each context. Default 16: wide trees need more than the 8 of
            Token Recycling.
        keep: weight of the old row, 0 to 1, when a context is observed again; the first few
            observations are averaged. Default 0.6: recent distributions follow the topic.
        rate: learning rate of the weights, 0 to 1, shared by the matching contexts. Default 0.1:
            larger rates forget, smaller ones lag.
        capacity: contexts kept, rounded up to a power of two; the least recently seen are
            replaced. Default 131072.
        warm: start from the trace that `paceline warm` recorded of this model, if there is one.
            Default true.
    """

    source = Source(
        note="ours; after Luo et al., Turning Trash into Treasure, arXiv 2408.08696, and the "
        "mixing in the logistic domain of Mahoney, PAQ, 2005"
    )
    examples = ("recycle", "recycle:orders=3,skips=4,k=5,capacity=64,keep=0.0,rate=1.0")

    tree: str = "best"
    orders: int = 8
    skips: int = 2
    k: int = 16
    keep: float = 0.6
    rate: float = 0.1
    capacity: int = 1 << 17
    warm: bool = True

    def __post_init__(self) -> None:
        if self.tree not in _TREES:
            raise MethodError(f"recycle:tree is {self.tree!r}, expected {', '.join(_TREES)}")
        if self.tree != "best":
            self._refuse_settings_of_best()
        check_range(1, 32, "recycle", orders=self.orders)
        check_range(0, 32, "recycle", skips=self.skips)
        check_range(1, 32, "recycle", k=self.k)
        check_range(0.0, 1.0, "recycle", keep=self.keep, rate=self.rate)
        check_range(8, 1 << 26, "recycle", capacity=self.capacity)

    def _refuse_settings_of_best(self) -> None:
        for setting in fields(self):
            if setting.name != "tree" and getattr(self, setting.name) != setting.default:
                raise MethodError(
                    f"recycle:tree={self.tree} has no use for {setting.name}; leave it out"
                )

    def build(self, target: Target) -> Drafter:
        """A drafter that has observed nothing yet."""
        if self.tree == "best":
            return _Recycle(self, target)
        return TokenRecycling(self.tree).build(target)


class _Recycle(Drafter):
    origins = ("recycle",)
    learns_from_prompt = True

    def __init__(self, method: Recycle, target: Target) -> None:
        self.top_k = min(method.k, target.vocab_size)
        self._vocab_size = target.vocab_size
        self._mixer = _native.ContextMixer(
            method.orders, method.skips, method.k, method.capacity, method.keep, method.rate
        )
        self._prompt = 0
        self._start = start_of(self, target, method.warm)

    def fork(self) -> Drafter:
        return copy(self)

    def begin(self, request: Request) -> None:
        self._prompt = len(request.prompt)

    def propose(self, context: Tokens, budget: int, min_path_prob: float = 0.0) -> TokenTree:
        return single_origin_tree(*self._mixer.propose(context, budget, min_path_prob))

    def observe(self, step: Step) -> None:
        # The prompt's own tokens were not drawn from the model: they teach the weights nothing.
        drawn = len(step.context) >= self._prompt
        self._mixer.observe(*step_arrays(step), drawn)

    def state(self) -> State:
        return mixer_state(self._mixer)

    def load(self, state: State) -> None:
        load_mixer(self._mixer, state, self._vocab_size)

    def reset(self) -> None:
        self._mixer.reset()
        if self._start:
            self.load(self._start)


_ROWS = ("keys", "counts", "written", "tokens", "probs")
_WEIGHTS = ("weights", "biases")


def mixer_state(mixer: _native.ContextMixer) -> State:
    """What a mixer has learnt; rows that are in use only."""
    arrays = mixer.arrays()
    used = np.flatnonzero(arrays["keys"])
    state = {name: arrays[name][used] for name in _ROWS}
    state |= {name: arrays[name].copy() for name in _WEIGHTS}
    return state | {"rows": used, "clock": np.array([mixer.clock], np.uint32)}


def load_mixer(mixer: _native.ContextMixer, state: State, vocab_size: int) -> None:
    """Take over what `mixer_state` gave.

    Raises:
        MethodError: the state belongs to other settings or another vocabulary.
    """
    arrays = mixer.arrays()
    _check(state, arrays, vocab_size)
    mixer.reset()
    for name in _ROWS:
        arrays[name][state["rows"]] = state[name]
    for name in _WEIGHTS:
        arrays[name][:] = state[name]
    mixer.clock = int(state["clock"][0])


def _check(state: State, arrays: State, vocab_size: int) -> None:
    """Refuse a state that this table cannot hold, or that could guess impossible tokens."""
    other = MethodError("this state is of a recycle with other settings; reset it")
    if state.keys() != {*_ROWS, *_WEIGHTS, "rows", "clock"}:
        raise other
    rows, clock = state["rows"], state["clock"]
    if rows.dtype != np.int64 or rows.ndim != 1 or clock.dtype != np.uint32 or clock.shape != (1,):
        raise other
    for name in _ROWS + _WEIGHTS:
        mine, theirs = arrays[name], state[name]
        length = len(rows) if name in _ROWS else len(mine)
        if theirs.dtype != mine.dtype or theirs.shape != (length, *mine.shape[1:]):
            raise other
    if len(rows) and (rows[0] < 0 or rows[-1] >= len(arrays["keys"]) or (np.diff(rows) <= 0).any()):
        raise other
    tokens = np.sort(state["tokens"], axis=1)
    twice = (tokens[:, 1:] == tokens[:, :-1]) & (tokens[:, 1:] >= 0)
    possible = (tokens >= -1) & (tokens < vocab_size)
    floats = [state["probs"], *(state[name] for name in _WEIGHTS)]
    if twice.any() or not possible.all() or not all(np.isfinite(f).all() for f in floats):
        raise MethodError("this state of recycle holds impossible successors; reset it")
