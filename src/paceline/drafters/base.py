"""The contracts of a drafter: frozen settings, and what was learnt with them.

A `DraftMethod` holds the settings and builds a `Drafter`. A drafter that runs a model is a
`ModelBacked`. It reaches the target's engine only through `Target`, and commits nothing: only
`decoding/` and `serving/` do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from paceline.abilities import Ability
from paceline.core import Floats, Request, State, Step, Tokens, TokenTree
from paceline.models.tokenizer import Tokenizer
from paceline.registry import Method

_PART = 4096  # tokens of a prompt in one step
_NEXT = 0.5  # probability of the token that follows in the prompt

if TYPE_CHECKING:
    from paceline.engines.base import Cached, Engine
    from paceline.models.model import Model
    from paceline.models.trace import Trace


@dataclass(frozen=True, slots=True)
class Target:
    """The model that a drafter drafts for.

    Attributes:
        vocab_size: every token is below it.
        engine: runs the model; for drafters that draft with the model itself.
        tokenizer: for drafters that read or write text.
        model: the checkpoint, for trained heads; None for an ensemble.
        trace: recorded generations of the model with its top-k predictions, for a warm start;
            `paceline warm` makes it.
    """

    vocab_size: int
    engine: Engine | None = None
    tokenizer: Tokenizer | None = None
    trace: Trace | None = None
    model: Model | None = None


class Drafter(ABC):
    """Proposes token trees. A wrong, stale or hostile one costs time, never correctness.

    Attributes:
        origins: names that `TokenTree.origin` indexes.
        top_k: number of successors of each node that `observe` needs; 0 if it ignores them.
        learns_from_prompt: call `observe` for every chunk of the prompt, too, as a chain whose
            nodes are all accepted. Costs the head's rows in the prefill, which may take longer than
            all the rest of it; `read_prompt` takes next to nothing and teaches nearly as much.
        uses_prediction: follows `Request.prediction`; with other drafters `LM` refuses one.
        drafts: False for plain decoding, which never proposes anything.
        only_prediction: proposes nothing where a request has no prediction.
        certain: proposes only tokens that the request's controls force.
        needs_hidden: needs the target's hidden states of each pass in `observe`.
        rollback: of a lossy drafter: accept a draft token if its surprise under the model is at
            most this, in nats. None: the model alone decides.
        needs: what it uses of the target's engine when it drafts.
    """

    origins: tuple[str, ...]
    top_k: int = 0
    learns_from_prompt: bool = False
    uses_prediction: bool = False
    drafts: bool = True
    only_prediction: bool = False
    certain: bool = False
    needs_hidden: bool = False
    rollback: float | None = None
    needs: frozenset[Ability] = frozenset()

    def fork(self) -> Drafter | None:
        """Return a drafter for a concurrent request, which shares what either of them learns.

        None where learned state cannot be shared: then build a new drafter, which learns alone.
        """
        return None

    def begin(self, request: Request) -> None:
        """Start a request whose prompt has not been run yet. Learned state is kept."""

    def read_prompt(self) -> None:
        """Learn from the tokens of the request's prompt, see `prompt_steps`.

        Called once before the first `propose` of a request, and not at all if drafting rests until
        its end.
        """

    @abstractmethod
    def propose(self, context: Tokens, budget: int, min_path_prob: float = 0.0) -> TokenTree:
        """Return a tree rooted at `context[-1]`.

        Args:
            context: int32 [S], every committed token; a view, which the next step changes.
            budget: most nodes beyond the root.
            min_path_prob: paths below this probability need not be proposed.
        """

    def forced_tree(self, context: Tokens, budget: int) -> TokenTree:
        """Return the tokens that the controls force, as `propose` does; used while drafting rests.

        No `observe` follows. The root alone from drafters that know of nothing forced.
        """
        if self.certain:
            return self.propose(context, budget)
        return TokenTree.root(int(context[-1]))

    def observe(self, step: Step) -> None:
        """Learn from a pass. Called once after each, in order."""

    def state(self) -> State:
        """Return what was learnt as named arrays; empty if nothing is."""
        return {}

    def load(self, state: State) -> None:
        """Restore what `state()` returned.

        Raises:
            MethodError: the state belongs to other settings or another vocabulary.
        """

    def reset(self) -> None:
        """Forget everything that was learnt."""


class ModelBacked(Drafter):
    """A drafter that runs models: the target's own layers, models of its own, or both.

    Attributes:
        has_draft_probs: under the rejection walk, siblings are draws without replacement, in their
            order, from the distributions that `distributions` returns.
    """

    has_draft_probs: bool = False

    def attach(self, sequence: Cached) -> None:
        """Receive the request's sequence once the prompt has been run, all but its last token.

        For drafters that draft with the target's engine: run views on it, never change it, and do
        not use it after the next `begin`. The decoding loop keeps it up to date.
        """

    @property
    def engines(self) -> Sequence[Engine]:
        """Engines of the drafter's own models, each with a sequence of its own."""
        return ()

    def follow(self, context: Tokens, max_tokens: int | None = None) -> int:
        """Let the drafter's own models read `context` [S], or up to `max_tokens` more of it.

        Once `max_tokens` is given it must be given on every call until `begin`; until the models
        have caught up, `propose` returns only the root. Without it, `propose` reads the rest.

        Returns:
            the largest number of tokens that one of the models read.

        Raises:
            MemoryFullError: an engine has no room. It can follow again later.
        """
        return 0

    def follow_recent(self, context: Tokens, max_tokens: int) -> int:
        """Let models that lag behind after a rest read what they lack, or little more than the end.

        Where they lack more than `max_tokens` of `context` [S], they may begin anew with its last
        `max_tokens`, and draft from these until the next `begin`.

        Returns:
            the largest number of tokens that one of the models read.

        Raises:
            MemoryFullError: an engine has no room. It can follow again later.
        """
        return self.follow(context)

    def ready(self, context: Tokens) -> bool:
        """Return whether it has read enough of `context` [S] to draft what comes after it."""
        return True

    def release(self) -> None:
        """Free the keys and values of the drafter's own models. Learned state is kept."""

    def distributions(self) -> Floats | None:
        """Return what the children of each node of the last proposal were drawn from, [N, V].

        Rows of nodes without children are undefined. None where `has_draft_probs` is false, and
        for requests with another walk.
        """
        return None


def engines_of(drafter: Drafter) -> Sequence[Engine]:
    """Return the engines of a drafter's own models; none of one that runs no model."""
    return drafter.engines if isinstance(drafter, ModelBacked) else ()


@dataclass(frozen=True)
class DraftMethod(Method, ABC):
    """Settings of a drafter: the fields of a subclass are its hyper-parameters.

    Class attributes describe the method for the CLI, the docs and the compatibility table.
    """

    @abstractmethod
    def build(self, target: Target) -> Drafter:
        """Return a drafter for `target` that has learnt nothing yet.

        Raises:
            MethodError: the target lacks something that the method needs.
        """


def single_origin_tree(tokens: Tokens, parents: Tokens, scores: Floats) -> TokenTree:
    """Return the tree of a drafter that has one origin."""
    origin = np.zeros(len(tokens), np.int16)
    origin[0] = -1
    return TokenTree(tokens, parents, scores, origin)


def prompt_steps(prompt: Sequence[int]) -> Iterator[Step]:
    """Yield a prompt as steps whose tokens were all accepted, without a pass of the model.

    A token's only known successor is the one that follows it, with a probability of a half.
    """
    tokens = np.array(prompt, np.int32)
    for start in range(0, len(tokens) - 1, _PART):
        part = tokens[start : start + _PART + 1]
        probs = np.full((len(part) - 1, 1), _NEXT, np.float32)
        path = np.arange(len(part) - 1, dtype=np.int32)
        context, drawn = tokens[: start + 1], part[1:]
        yield Step(context, TokenTree.chain(part[:-1]), drawn[:, None].copy(), probs, path, drawn)


def step_arrays(step: Step) -> tuple[Tokens, Tokens, Tokens, Tokens, Floats, Tokens, Tokens]:
    """Return a step as native code takes it: context, tree, successors, path and draws."""
    tree = step.tree
    top = (step.top_tokens, step.top_probs)
    return (step.context, tree.tokens, tree.parents, *top, step.path, step.drawn)
