"""Optional capabilities of a control, which the loop, drafters and searches look for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from paceline.core import Control, Floats, Tokens, TokenTree
from paceline.engines.base import Cached, Engine


@runtime_checkable
class ForcesTokens(Protocol):
    """A control that may leave no choice; the drafter `forced` asks it."""

    def forced(self, history: list[int]) -> list[int]:
        """The tokens that must come next after `history`; empty where there is a choice."""
        ...


@runtime_checkable
class FiltersDrafts(Protocol):
    """A control that knows which guesses are in vain; they are dropped before a pass."""

    def allows(self, history: list[int], tree: TokenTree) -> NDArray[np.bool_]:
        """Which nodes of `tree` can be drawn, bool [N]; with a node its parent. Always the root.

        `history` ends with the root. Of a node that cannot be drawn nothing is said.
        """
        ...


@runtime_checkable
class RejectsText(Protocol):
    """A control that knows of texts that can never be part of an output."""

    name: str

    def can_contain(self, text: str) -> bool:
        """Whether `text` can stand behind a boundary of words in some output."""
        ...


@runtime_checkable
class RequiresText(Protocol):
    """A control that wants texts in the output: it is told of those that may forbid them."""

    def check_possible(self, judges: Sequence[RejectsText]) -> None:
        """Look whether what is wanted can be had.

        Raises:
            RequestError: it cannot.
        """
        ...


@runtime_checkable
class RunsModel(Protocol):
    """A control that runs a model: once over each tree, not once at each node.

    `apply` then finds its row. Asked about a text that was not looked at, it runs it by itself: a
    caller who needs further rows of the last pass must have copied them, for guides may share the
    engine.
    """

    def begin(self, sequence: Cached) -> None:
        """A request starts. `sequence` follows the loop; it may be viewed in `run_tree` only."""
        ...

    def lag(self, context: Tokens) -> int:
        """Tokens that a text of its own lacks; 0 where they can ride with the next tree."""
        ...

    def follow(self, context: Tokens, max_tokens: int | None = None) -> int:
        """Read `context` [S] but its last token, at most `max_tokens` more; return how many.

        Whatever is left unread, `run_tree` reads.
        """
        ...

    def positions(self, length: int) -> Sequence[tuple[Engine, int]]:
        """The positions of each text of its own, and in which engine, for `length` tokens."""
        ...

    def run_tree(self, context: Tokens, tree: TokenTree) -> None:
        """`tree`, whose root is `context[-1]`, is about to be run; it may not be kept."""
        ...

    def release(self) -> None:
        """The request has ended, or was interrupted: give all sequences back."""
        ...


@runtime_checkable
class Forkable(RunsModel, Control, Protocol):
    """A guide that can follow several texts, each by a fork of its own: searches need it.

    Attributes:
        grows: a text may only be asked about after all that it begins with, one token apart.
    """

    append_only: bool

    def fork(self, context: Tokens, target: Cached | None) -> Self:
        """Another, to go its own way from what this one has read of `context` [S].

        `target` holds the context but its last token; where it is None, `begin` comes.
        """
        ...

    def ranking_logits(self, logits: Floats, history: list[int]) -> Floats:
        """As `apply`; but where that depends on the temperature, as if it were 1.

        What searches compare are chances, not draws.
        """
        ...


@runtime_checkable
class ExtendsDrafts(FiltersDrafts, Protocol):
    """A control that knows what must follow a guess; it is guessed, too."""

    def extensions(
        self, history: list[int], tree: TokenTree
    ) -> tuple[NDArray[np.bool_], dict[int, list[int]]]:
        """As `allows`; and by node the tokens that must follow it, where `tree` has not the first.

        Never of the root: what must follow that is the drafter's to say.
        """
        ...


Mask = NDArray[np.uint32]  # a bit for each token [V / 32], lowest first; none beyond V


@runtime_checkable
class MasksTokens(Protocol):
    """A control that says at once which tokens may come next; drafts grow by it."""

    def masks(self, history: list[int]) -> Callable[[Sequence[int]], Mask | None]:
        """Of tokens that come after `history`: the mask behind them; None where nothing is said.

        Nothing follows what cannot be drawn, nor a stop token. Ask before other questions.
        """
        ...

    def known(self, history: list[int], tree: TokenTree) -> dict[int, Mask]:
        """By node of `tree`, whose root `history` ends with, the masks that were asked for."""
        ...


@runtime_checkable
class SingleSequence(Protocol):
    """A control that follows one growing text: asked about another in between it would err."""

    single_sequence: bool


@runtime_checkable
class LowEntropy(Protocol):
    """A control that leaves the seed little to say: samples of one prompt are hardly different."""

    low_entropy: bool
