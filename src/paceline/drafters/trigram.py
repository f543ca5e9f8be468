"""ADED: tri-grams of the model's predictions under a tree search."""

from __future__ import annotations

from dataclasses import dataclass

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
from paceline.drafters.state import load_table, table_state
from paceline.registry import Source, check_range, drafters


@drafters.register("trigram", Exactness.EXACT)
@dataclass(frozen=True)
class Trigram(DraftMethod):
    """Predict from the last two tokens, and search a tree that also tries unlikely branches.

    The most likely successors at every node of every pass, rejected nodes included, update the row
    of the two tokens that end there. The tree is grown by simulations in the manner of Monte Carlo
    tree search: each descends to the child with the best mean value plus a bonus (PUCT) for what
    is likely and was seldom visited, and ends with a new node. The value of a visit is the number
    of tokens that the branch is expected to add. Scores are not the probabilities in the rows but
    how often successors of such a rank and probability were drawn, which is learnt.

    The baseline for recycle's contexts of several orders.

    State: `capacity` rows of 16 + 8k bytes and 40 floats; carried across requests. Cost of a
    proposal: 3 to 4 microseconds a node.
    Good for: comparison; short habits of the model, in very little memory.

    Based on Liu et al., Adaptive Draft-Verification, arXiv 2407.12021.

    Attributes:
        k: successors kept for two tokens. Default 8.
        explore: weight of the bonus; 0 follows the most likely branches. Default 1.
        depth: nodes of the longest branch. Default 16.
        keep: weight of the old row, 0 to 1, when two tokens are observed again. Default 0.6.
        rate: learning rate of the probabilities, 0 to 1. Default 0.02: about 50 tokens.
        capacity: rows kept, rounded up to a power of two; the least recently seen are replaced.
            Default 65536.
    """

    source = Source(
        authors="Liu et al.",
        title="Adaptive Draft-Verification",
        arxiv="2407.12021",
        note="tri-grams start empty, not from a corpus, and are bounded; the value of a visit and "
        "the scores are ours",
    )
    catalogue = (354,)
    examples = ("trigram", "trigram:k=1,explore=0,depth=1,capacity=8")
    missing = {354: "tri-grams counted on a corpus beforehand"}

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
        """Return a drafter that has observed nothing yet."""
        return _Trigram(self, target.vocab_size)


class _Trigram(Drafter):
    origins = ("trigram",)

    def __init__(self, method: Trigram, vocab_size: int) -> None:
        self.top_k = min(method.k, vocab_size)
        self._method = method
        self._vocab_size = vocab_size
        self._native = _native.TrigramSearch(
            method.k, method.capacity, method.explore, method.depth, method.keep, method.rate
        )
        self._prompt: tuple[int, ...] = ()
        self._unread: tuple[int, ...] = ()

    def begin(self, request: Request) -> None:
        self._prompt = self._unread = request.prompt

    def read_prompt(self) -> None:
        for step in prompt_steps(self._unread):
            self._native.observe(*step_arrays(step), False)
        self._unread = ()

    def propose(self, context: Tokens, budget: int, min_path_prob: float = 0.0) -> TokenTree:
        return single_origin_tree(*self._native.propose(context, budget))

    def observe(self, step: Step) -> None:
        drawn = len(step.context) >= len(self._prompt)
        self._native.observe(*step_arrays(step), drawn)

    def state(self) -> State:
        return table_state(self._arrays(), self._native.clock)

    def load(self, state: State) -> None:
        arrays, ranges = self._arrays(), {"reliability": (0.0, 1.0)}
        self._native.clock = load_table(
            "trigram", state, arrays, self._vocab_size, self.reset, ranges
        )

    def reset(self) -> None:
        self._native.reset()

    def _arrays(self) -> State:
        arrays = self._native.arrays()
        wide = {name: arrays[name].reshape(-1, self._method.k) for name in ("tokens", "probs")}
        return arrays | wide
