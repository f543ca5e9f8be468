"""Optional capabilities of a control, which the loop, drafters and searches check for.

A control has one if it has its members; nothing needs to be inherited.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from paceline.core import Control, Floats, Tokens, TokenTree
from paceline.engines.base import Cached, Engine


@runtime_checkable
class ForcesTokens(Protocol):
    """A control that may leave only one token; the drafter `forced` drafts these."""

    def forced(self, history: list[int]) -> list[int]:
        """Return the tokens that must follow `history`; empty if there is a choice."""
        ...


@runtime_checkable
class FiltersDrafts(Protocol):
    """A control that knows which drafted nodes it will reject; they are dropped before a pass."""

    def allows(self, history: list[int], tree: TokenTree) -> NDArray[np.bool_]:
        """Return which nodes of `tree` can be drawn, bool [N].

        The root is kept always, and a node only with its parent. False means that the node cannot
        be drawn; True is no promise.

        Args:
            history: ends with the root.
            tree: the draft.
        """
        ...


@runtime_checkable
class Truncates(Protocol):
    """A control that only forbids the less likely tokens, by their logits alone.

    It keeps the most likely token always.
    """

    def keeps(self, logit: np.float32, above: Floats) -> bool:
        """Whether a token is kept, whatever the logits below its own are.

        False is no promise that it is not.

        Args:
            logit: of the token, as `apply` would get it.
            above: float32 [n], the logits of all tokens that are at least as large, its own
                included.
        """
        ...


@runtime_checkable
class RejectsText(Protocol):
    """A control that knows texts which can never be part of an output."""

    name: str

    def can_contain(self, text: str) -> bool:
        """Return whether some output can contain `text` at the beginning of a word."""
        ...


@runtime_checkable
class RequiresText(Protocol):
    """A control that requires texts in the output, and checks them against other controls."""

    def check_possible(self, rejecting: Sequence[RejectsText]) -> None:
        """Check the required texts against the controls that may reject them.

        Raises:
            RequestError: one of the texts can never occur.
        """
        ...


@runtime_checkable
class RunsModel(Protocol):
    """A control that runs a model, once over each tree instead of once at each node.

    `apply` then reads its row of logits. For a text that is not in the last tree, `apply` runs the
    model itself. Guides may share the target's engine, so a caller that needs more rows of the
    engine's last pass must copy them before.
    """

    def begin(self, sequence: Cached) -> None:
        """Start a request. `sequence` is the target's own; only `run_tree` may view it."""
        ...

    def lag(self, context: Tokens) -> int:
        """Return how many tokens are unread; 0 where the next tree's pass can include them."""
        ...

    def follow(self, context: Tokens, max_tokens: int | None = None) -> int:
        """Read `context` [S] but its last token, at most `max_tokens` more; return how many.

        Tokens left unread are read by `run_tree`.
        """
        ...

    def positions(self, length: int) -> Sequence[tuple[Engine, int]]:
        """Return engine and number of positions of every sequence of its own at `length` tokens."""
        ...

    def run_tree(self, context: Tokens, tree: TokenTree) -> None:
        """Run the model over `tree`, whose root is `context[-1]`, before the target does."""
        ...

    def release(self) -> None:
        """Release all sequences: the request has ended or was interrupted."""
        ...


@runtime_checkable
class Forkable(RunsModel, Control, Protocol):
    """A guide that can follow several texts, each in a fork of its own. Searches need it.

    Attributes:
        grows: a text may only be asked about after all that it begins with, one token apart.
    """

    append_only: bool

    def fork(self, context: Tokens, target: Cached | None) -> Self:
        """Return a guide that shares what this one has read of `context` [S].

        Args:
            context: the text so far.
            target: the fork's sequence of the target, which holds the context but its last token.
                None: `begin` will be called.
        """
        ...

    def ranking_logits(self, logits: Floats, history: list[int]) -> Floats:
        """Return what `apply` returns at temperature 1.

        Searches rank by probability, and draw nothing.
        """
        ...


@runtime_checkable
class ExtendsDrafts(FiltersDrafts, Protocol):
    """A control that knows which tokens must follow a drafted node; they are drafted, too."""

    def extensions(
        self, history: list[int], tree: TokenTree
    ) -> tuple[NDArray[np.bool_], dict[int, list[int]]]:
        """Return the mask of `allows`, and for some nodes the tokens that must follow.

        A node is listed if `tree` lacks the first of these tokens. The root never is: drafting what
        must follow it is left to the drafter.
        """
        ...


Mask = NDArray[np.uint32]  # uint32 [ceil(V / 32)]: one bit per token, lowest first, 0 beyond V


@runtime_checkable
class MasksTokens(Protocol):
    """A control that gives the set of allowed tokens as a bit mask, for drafters to grow within."""

    def masks(self, history: list[int]) -> Callable[[Sequence[int]], Mask | None]:
        """Return a function from tokens after `history` to the mask of what may follow them.

        It gives None where the control does not know, and an empty mask after a stop token or after
        tokens that cannot be drawn. Call this before the control's other methods in a pass.
        """
        ...

    def known(self, history: list[int], tree: TokenTree) -> dict[int, Mask]:
        """Return, by node of `tree`, the masks that were computed; its root ends `history`."""
        ...


@runtime_checkable
class SingleSequence(Protocol):
    """A control with state for one growing text: it cannot serve several texts in turn."""

    single_sequence: bool


@runtime_checkable
class LowEntropy(Protocol):
    """A control under which samples of one prompt hardly differ, whatever the seed."""

    low_entropy: bool
