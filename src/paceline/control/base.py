"""What the files of this folder share: the contract of a control, and where it stands in order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import numpy as np

from paceline.control.capabilities import RejectsText, RequiresText
from paceline.core import Control, Floats, Request, TokenTree
from paceline.errors import MethodError, RequestError
from paceline.models.vocabulary import Vocabulary
from paceline.registry import Method


@dataclass(frozen=True)
class ControlMethod(Method, ABC):
    """Settings of a control: its fields. `bind` makes of them what edits logits.

    Attributes:
        order: controls are applied from the lowest up: biases 10, penalties 20, what is forbidden
            or forced 30, temperature 40, truncation 60.
        paths: its settings that name places on this machine: a server's clients may not set them.
    """

    order: ClassVar[int]
    paths: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def bind(self, request: Request, vocabulary: Vocabulary) -> Control:
        """The control for one request.

        Raises:
            PacelineError: the request or the model lacks something, in one sentence.
        """


@dataclass(frozen=True)
class Stateless(ControlMethod):
    """A method that is its own control: it needs to know nothing of the request."""

    def bind(self, request: Request, vocabulary: Vocabulary) -> Control:
        """Itself."""
        return self

    @abstractmethod
    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """Return edited logits [V]; see `core.Control`."""


@dataclass(frozen=True)
class Force:
    """Allow only `token` at `position`, even if an earlier control forbade it there."""

    token: int
    position: int

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """See `core.Control`."""
        if len(history) != self.position:
            return logits
        edited = np.full_like(logits, -np.inf)
        edited[self.token] = 0.0
        return edited

    def forced(self, history: list[int]) -> list[int]:
        """See `ForcesTokens`."""
        return [self.token] if len(history) == self.position else []


def paths(tree: TokenTree) -> list[tuple[int, ...]]:
    """The tokens from below the root of a tree to each node."""
    found: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.tokens[1:].tolist(), tree.parents[1:].tolist(), strict=True):
        found.append((*found[parent], token))
    return found


M = TypeVar("M", bound=ControlMethod)


def chain(methods: Iterable[M]) -> tuple[M, ...]:
    """The methods in the order in which they are applied.

    Raises:
        MethodError: one is there twice.
    """
    found = tuple(sorted(methods, key=lambda method: method.order))
    kinds = [type(method) for method in found]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise MethodError(f"{getattr(kind, 'name', kind.__name__)} is given twice; give one")
    return found


def bind(methods: Iterable[ControlMethod], request: Request, vocabulary: Vocabulary) -> Request:
    """`request` with the controls of `methods`, in their order.

    Raises:
        PacelineError: one cannot be had.
    """
    controls = tuple(method.bind(request, vocabulary) for method in chain(methods))
    judges = [control for control in controls if isinstance(control, RejectsText)]
    for control in controls:
        if isinstance(control, RequiresText):
            control.check_possible(judges)
    return replace(request, controls=controls)


def shared(a: list[int], b: list[int]) -> int:
    """How many first items are the same."""
    if b[: len(a)] == a:
        return len(a)
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def require(condition: bool, name: str, found: float, expected: str) -> None:
    """Refuse a setting in one sentence.

    Raises:
        RequestError: unless `condition`; a NaN never meets one.
    """
    if not condition:
        raise RequestError(f"{name} is {found}, expected {expected}")
