"""Recycling: predict the next token from the model's own predictions in similar contexts."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, fields

from paceline import _native
from paceline.core import Exactness, Request, State, Step, Tokens, TokenTree
from paceline.drafters.base import (
    Drafter,
    DraftMethod,
    Target,
    prompt_steps,
    single_origin_tree,
    step_arrays,
)
from paceline.drafters.history.warm_start import start_of
from paceline.drafters.state import load_table, table_state
from paceline.drafters.token_recycling import TokenRecycling
from paceline.errors import MethodError
from paceline.registry import Source, check_range, drafters

_TREES = ("best", "static", "paper")


@drafters.register("recycle", Exactness.EXACT)
@dataclass(frozen=True)
class Recycle(DraftMethod):
    """Predict the next token from the model's own top-k predictions in similar contexts; ours.

    Every pass computes a distribution at every node, rejected nodes included. Their top k are kept
    by context: the last 1 to `orders` tokens, the one token 2 to `skips + 1` positions back, and
    the empty context. The row of a context is a running average of the distributions observed
    there. In the prompt, whose distributions would cost the head for every token, the token that
    follows counts as half of one. To predict, the rows of all contexts that match are mixed: the
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
        """Return a drafter that has observed nothing yet."""
        if self.tree == "best":
            return _Recycle(self, target)
        return TokenRecycling(self.tree).build(target)


class _Recycle(Drafter):
    origins = ("recycle",)

    def __init__(self, method: Recycle, target: Target) -> None:
        self.top_k = min(method.k, target.vocab_size)
        self._vocab_size = target.vocab_size
        self._mixer = _native.ContextMixer(
            method.orders, method.skips, method.k, method.capacity, method.keep, method.rate
        )
        self._prompt: tuple[int, ...] = ()
        self._unread: tuple[int, ...] = ()
        self._start = start_of(self, target, method.warm)

    def fork(self) -> Drafter:
        return copy(self)

    def begin(self, request: Request) -> None:
        self._prompt = self._unread = request.prompt

    def read_prompt(self) -> None:
        # Tokens of the prompt were not drawn from the model: the weights learn nothing from them.
        for step in prompt_steps(self._unread):
            self._mixer.observe(*step_arrays(step), False)
        self._unread = ()

    def propose(self, context: Tokens, budget: int, min_path_prob: float = 0.0) -> TokenTree:
        return single_origin_tree(*self._mixer.propose(context, budget, min_path_prob))

    def observe(self, step: Step) -> None:
        drawn = len(step.context) >= len(self._prompt)
        self._mixer.observe(*step_arrays(step), drawn)

    def state(self) -> State:
        return mixer_state(self._mixer)

    def load(self, state: State) -> None:
        load_mixer(self._mixer, state, self._vocab_size)

    def reset(self) -> None:
        self._mixer.reset()
        if self._start:
            self.load(self._start)


def mixer_state(mixer: _native.ContextMixer) -> State:
    """Return what a mixer has learnt: the contexts in use, and the weights."""
    return table_state(mixer.arrays(), mixer.clock)


def load_mixer(mixer: _native.ContextMixer, state: State, vocab_size: int) -> None:
    """Restore what `mixer_state` returned.

    Raises:
        MethodError: the state belongs to other settings or another vocabulary.
    """
    mixer.clock = load_table("recycle", state, mixer.arrays(), vocab_size, mixer.reset)
