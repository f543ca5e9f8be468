"""The contract of a drafter, in two parts: frozen settings, and what was learnt with them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from paceline.core import Floats, Request, State, Step, Tokens, TokenTree
from paceline.engines.base import Cached, Engine
from paceline.models.tokenizer import Tokenizer
from paceline.registry import Method

if TYPE_CHECKING:
    from paceline.models.model import Model
    from paceline.models.trace import Trace


@dataclass(frozen=True, slots=True)
class Target:
    """The model that a drafter guesses for.

    Attributes:
        vocab_size: tokens are below it.
        engine: runs the model; for drafters that draft with the model itself.
        tokenizer: for drafters that speak text.
        model: its checkpoint, for trained heads; None for an ensemble.
        trace: what the model wrote and thought before, for a warm start; `paceline warm` makes it.
    """

    vocab_size: int
    engine: Engine | None = None
    tokenizer: Tokenizer | None = None
    trace: Trace | None = None
    model: Model | None = None


class Drafter(ABC):
    """Guesses token trees. Free to be wrong, stale or hostile: it costs time, never correctness.

    Attributes:
        origins: names that `TokenTree.origin` indexes.
        top_k: how many successors of each node `observe` wants; 0 when it does not look at them.
        learns_from_prompt: `observe` is also called for every chunk of the prompt, as a chain
            whose nodes are all accepted. Costs the head's rows in the prefill.
        uses_prediction: follows `Request.prediction`; with other drafters `LM` refuses one.
        certain: guesses only what the request's controls force.
        has_draft_probs: for requests with the rejection walk, siblings are draws without
            replacement, in their order, from what `distributions` gives.
        needs_hidden: `observe` wants the hidden states of each pass.
        rollback: of a lossy drafter: a guess stands that surprises the model by no more than so
            many nats. None: the model decides alone.
    """

    origins: tuple[str, ...]
    top_k: int = 0
    learns_from_prompt: bool = False
    uses_prediction: bool = False
    certain: bool = False
    has_draft_probs: bool = False
    rollback: float | None = None
    needs_hidden: bool = False

    def fork(self) -> Drafter | None:
        """A drafter for another request at the same time; what either learns both know.

        None where that cannot be: a drafter built anew learns alone.
        """
        return None

    def begin(self, request: Request) -> None:
        """A new request starts, its prompt not yet run. What was learnt before stays."""

    def attach(self, sequence: Cached) -> None:
        """The prompt has been run: `sequence` holds all but its last token, and follows the loop.

        For drafters that draft with the target's engine. It must not be changed, and not be used
        after the next `begin`.
        """

    @property
    def engines(self) -> Sequence[Engine]:
        """That run models of its own, each on a text of its own."""
        return ()

    def follow(self, context: Tokens, most: int | None = None) -> int:
        """Let models of its own read `context` [S], or up to `most` tokens more of it.

        Who gives a number has to go on doing so until the next `begin`: a model that has not
        caught up guesses nothing meanwhile. Otherwise `propose` lets it read what it lacks.

        Returns:
            the most tokens that one of them has read.

        Raises:
            MemoryFullError: its engine has no room. It can follow again.
        """
        return 0

    def ready(self, context: Tokens) -> bool:
        """Whether it has caught up, so far as it must to guess what comes after `context`."""
        return True

    def release(self) -> None:
        """Give keys and values of its own back; what was learnt stays."""

    @abstractmethod
    def propose(self, context: Tokens, budget: int, min_path_prob: float = 0.0) -> TokenTree:
        """Return a tree rooted at `context[-1]`.

        Args:
            context: int32 [S], every committed token; a view, which the next step changes.
            budget: most nodes beyond the root.
            min_path_prob: paths below this probability need not be proposed.
        """

    def forced_tree(self, context: Tokens, budget: int) -> TokenTree:
        """As `propose`, but only what the controls leave no choice about; asked during rests.

        No `observe` follows. The root alone from drafters that know nothing forced.
        """
        if self.certain:
            return self.propose(context, budget)
        return TokenTree.root(int(context[-1]))

    def distributions(self) -> Floats | None:
        """What the children of each node of the last proposal were drawn from, [N, V].

        Rows of nodes without children say nothing. None where `has_draft_probs` is false, and for
        requests with another walk.
        """
        return None

    def observe(self, step: Step) -> None:
        """Learn from a pass. Called once after each, in order."""

    def state(self) -> State:
        """What was learnt, as named arrays; empty when nothing is."""
        return {}

    def load(self, state: State) -> None:
        """Take over what `state()` gave.

        Raises:
            MethodError: the state belongs to other settings or another vocabulary.
        """

    def reset(self) -> None:
        """Forget everything that was learnt."""


@dataclass(frozen=True)
class DraftMethod(Method, ABC):
    """Settings of a drafter: the fields of a subclass are its hyper-parameters.

    Class attributes describe the method for the CLI, the docs and the compatibility table.
    """

    @abstractmethod
    def build(self, target: Target) -> Drafter:
        """A drafter for `target` that has learnt nothing yet.

        Raises:
            MethodError: the target lacks something that the method needs.
        """


def single_origin_tree(tokens: Tokens, parents: Tokens, scores: Floats) -> TokenTree:
    """The tree of a drafter with one origin."""
    origin = np.zeros(len(tokens), np.int16)
    origin[0] = -1
    return TokenTree(tokens, parents, scores, origin)


def step_arrays(step: Step) -> tuple[Tokens, Tokens, Tokens, Tokens, Floats, Tokens, Tokens]:
    """A step as native code takes it: context, tree, successors, path and draws."""
    tree = step.tree
    top = (step.top_tokens, step.top_probs)
    return (step.context, tree.tokens, tree.parents, *top, step.path, step.drawn)
