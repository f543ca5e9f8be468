"""The contract of a drafter, in two parts: frozen settings, and what was learnt with them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from paceline.core import Floats, State, Step, Tokens, TokenTree
from paceline.errors import MethodError


class Drafter(ABC):
    """Guesses token trees. Free to be wrong, stale or hostile: it costs time, never correctness.

    Attributes:
        origins: names that `TokenTree.origin` indexes.
        top_k: how many successors of each node `observe` wants; 0 when it does not look at them.
        learns_from_prompt: `observe` is also called for every chunk of the prompt, as a chain
            whose nodes are all accepted. Costs the head's rows in the prefill.
    """

    origins: tuple[str, ...]
    top_k: int = 0
    learns_from_prompt: bool = False

    def begin(self, prompt: Tokens) -> None:
        """A new request starts with `prompt` int32 [S]. What was learnt before stays."""

    @abstractmethod
    def propose(self, context: Tokens, budget: int) -> TokenTree:
        """A tree rooted at `context[-1]` with at most `budget` nodes beyond the root.

        `context` int32 [S] holds every committed token; it is a view that the next step changes.
        """

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
class DraftMethod(ABC):
    """Settings of a drafter: the fields of a subclass are its hyper-parameters.

    Class attributes describe the method for the CLI, the docs and the compatibility table.
    """

    paper: ClassVar[str]
    catalogue: ClassVar[tuple[int, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def build(self, vocab_size: int) -> Drafter:
        """A drafter that has learnt nothing yet, for tokens below `vocab_size`."""


def grown(tokens: Tokens, parents: Tokens, scores: Floats) -> TokenTree:
    """The tree of a drafter with one origin."""
    origin = np.zeros(len(tokens), np.int16)
    origin[0] = -1
    return TokenTree(tokens, parents, scores, origin)


def within(low: float, high: float, method: str, **settings: float) -> None:
    """Refuse settings outside `low..high`, and those that are no numbers.

    Raises:
        MethodError: names the setting, its value and the limits.
    """
    for name, value in settings.items():
        if not low <= value <= high:
            raise MethodError(f"{method}:{name} is {value}, expected {low} to {high}")
