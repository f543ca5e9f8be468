"""Settings and base class of drafters that run a model, or a part of one, to grow trees."""

from __future__ import annotations

from abc import abstractmethod
from copy import copy
from dataclasses import dataclass

import numpy as np

from paceline.core import Floats, Request, State, Tokens, TokenTree
from paceline.drafters.base import Drafter, DraftMethod, ModelBacked
from paceline.drafters.draft_model import stop_rules
from paceline.drafters.draft_model.calibration import Calibration
from paceline.drafters.draft_model.frequent_tokens import FrequentTokens
from paceline.drafters.draft_model.tree_growth import (
    GrownTree,
    GrowthLimits,
    Judge,
    Run,
    grow,
    sample,
)
from paceline.errors import MethodError
from paceline.registry import check_range

_CHILDREN = 16  # successors of a node that may become nodes
_STREAM = 1  # tells these random numbers from those of the walk


@dataclass(frozen=True, kw_only=True)
class DraftSettings(DraftMethod):
    """Settings of a drafter that runs a model.

    Attributes:
        width: nodes that each draft pass runs, 1 to 64; 1 is a chain with its runners-up around
            it. Default 4: more passes hide behind one pass of the target than rows do.
        depth: most draft passes for a proposal, and so the depth of the deepest node. Default 8.
        stop: when drafting ends before that: `confidence` when the next pass is reached with too
            small a probability (SpecDec++'s rule), `adaptive` at a probability that follows what
            was accepted (LLMCad), `bandit` by Thompson sampling (EESD), `depth` never. Default
            confidence.
        threshold: of `confidence`: smallest probability that the next pass is of use. Default 0.2:
            from there a draft pass that costs a tenth of the target's pays.
        rate: learning rate of the sharpness of draft probabilities, 0 to 1. Default 0.02: about 50
            tokens.
    """

    width: int = 4
    depth: int = 8
    stop: str = "confidence"
    threshold: float = 0.2
    rate: float = 0.02

    def __post_init__(self) -> None:
        name = getattr(type(self), "name", "draft")
        check_range(1, 64, name, width=self.width, depth=self.depth)
        check_range(0.0, 1.0, name, threshold=self.threshold, rate=self.rate)
        if self.stop not in stop_rules.NAMES:
            raise MethodError(
                f"{name}:stop is {self.stop!r}, expected {', '.join(stop_rules.NAMES)}"
            )
        if self.stop != "confidence" and self.threshold != type(self).threshold:
            raise MethodError(f"{name}:stop={self.stop} does not use threshold; leave it out")


class ModelDrafter(ModelBacked):
    """Grows trees by draft passes; a subclass runs one pass.

    Args:
        method: the settings.
        vocab_size: of the target.
        shared: draft and target share a vocabulary.
        frequent: the tokens that may be proposed; None for all.

    Attributes:
        ids: int32, tokens that the columns of `run` belong to; None: the first V.
    """

    ids: Tokens | None = None

    def __init__(
        self,
        method: DraftSettings,
        vocab_size: int,
        shared: bool = True,
        frequent: FrequentTokens | None = None,
    ) -> None:
        self._method, self._frequent = method, frequent
        self._vocab_size = vocab_size
        self._calibration = Calibration(method.rate, vocab_size, shared)
        self._stop = stop_rules.stop_rule(method.stop, method.threshold)
        self._request = Request((0,), 1)
        self._last: GrownTree | None = None
        self._length = 0  # of the last proposal's context
        self.has_draft_probs = shared

    @abstractmethod
    def room(self, context: Tokens) -> int:
        """Return how many levels below the root can be run; negative if the root cannot."""

    @abstractmethod
    def run(self, context: Tokens, tree: TokenTree, fresh: int) -> Floats:
        """Run a tree below `context[-1]` in a pass; return logits [fresh, V] of its last nodes."""

    def fork(self) -> Drafter | None:
        """Return a drafter that runs the same model on a text of its own; see `Drafter`."""
        other = copy(self)
        other._calibration, other._stop = self._calibration.fork(), copy(self._stop)
        other._frequent = copy(self._frequent)
        return other

    def begin(self, request: Request) -> None:
        """See `Drafter`."""
        self._request, self._last = request, None
        self._calibration.begin(request)
        if self._frequent is not None:
            self._frequent.begin(np.array(request.prompt, np.int32))

    def propose(self, context: Tokens, budget: int, min_path_prob: float = 0.0) -> TokenTree:
        """See `Drafter`."""
        self.count(context)
        return self.grow(context, budget)

    def count(self, context: Tokens) -> None:
        """Count the new tokens of the target's text, and choose `ids` by them."""
        if self._frequent is not None:
            self.ids = self._frequent.follow(context)

    def grow(self, context: Tokens, budget: int) -> TokenTree:
        """Learn from what was accepted of the last tree, and grow the next one."""
        self._settle(context)
        seed, position = self._request.seed, len(context)
        method, levels = self._method, self.room(context)
        limits = GrowthLimits(budget, method.width, method.depth, levels, self._stop.more)
        self._stop.begin(seed, position)

        def run(tree: TokenTree, fresh: int) -> Floats:
            return self.run(context, tree, fresh)

        def judge(logits: Floats, depths: Tokens) -> tuple[Tokens, Floats]:
            return self._calibration.judge(
                logits, depths + position, min(budget, _CHILDREN), self.ids
            )

        random = np.random.default_rng((seed % (1 << 64), position, _STREAM))

        def draw(logits: Floats, counts: list[int]) -> tuple[Floats, list[Tokens]]:
            return self._calibration.draw(logits, counts, random, self.ids)

        root = int(context[-1])
        if self._samples:
            growth = sample(root, limits, run, draw, self._calibration.ranks())
        else:
            growth = self.expand(context, limits, run, judge)
        self._last, self._length = growth, position
        return growth.tree

    def expand(self, context: Tokens, limits: GrowthLimits, run: Run, judge: Judge) -> GrownTree:
        """Return the tree below `context[-1]`."""
        return grow(int(context[-1]), limits, run, judge)

    def distributions(self) -> Floats | None:
        """See `Drafter`."""
        if self._last is None or not self._samples:
            return None
        rows = np.zeros((len(self._last.tree), self._vocab_size), np.float32)
        for node, (_, row) in self._last.rows.items():
            rows[node] = row
        return rows

    def state(self) -> State:
        """See `Drafter`."""
        frequent = self._frequent.state() if self._frequent else {}
        return self._calibration.state() | self._stop.state() | frequent

    def load(self, state: State) -> None:
        """See `Drafter`."""
        if state.keys() != self.state().keys():
            raise MethodError(f"this state is not of {self.origins[0]} with this stop; reset it")
        self._calibration.load(state)
        self._stop.load(state)
        if self._frequent is not None:
            self._frequent.load(state)

    def reset(self) -> None:
        """See `Drafter`."""
        self._calibration.reset()
        self._stop.reset()
        self._last = None
        if self._frequent is not None:
            self._frequent.reset()

    @property
    def _samples(self) -> bool:
        """Whether siblings are drawn from the draft's distribution, for the rejection walk."""
        return self._request.walk == "rejection" and self._request.temperature > 0

    def _settle(self, context: Tokens) -> None:
        """Learn from the tokens that followed the root of the last tree."""
        last, self._last = self._last, None
        if last is None or len(context) <= self._length:
            return
        if context[self._length - 1] != last.tree.tokens[0]:
            return
        tree, node, accepted = last.tree, 0, 0
        for token in context[self._length :].tolist():
            child = tree.child(node, token)
            if node in last.rows:
                self._learn(last, node, token, child)
            if child is None:
                break
            node, accepted = child, accepted + 1
        self._stop.learn(int(tree.depths().max()), accepted)

    def _learn(self, last: GrownTree, node: int, token: int, child: int | None) -> None:
        tokens, scores = last.rows[node]
        if not self._samples:
            self._calibration.learn(token, tokens, scores)
            return
        siblings = np.flatnonzero(last.tree.parents == node).tolist()
        tested = len(siblings) if child is None else siblings.index(child) + 1
        self._calibration.rank(tested, child is not None)
