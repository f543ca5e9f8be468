"""Contract of controls: a method's settings become an object that edits logits."""

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
    """Settings of a control. `bind` turns them into an object that edits logits.

    Attributes:
        order: controls are applied in increasing order: biases 10, penalties 20, forbidden and
            forced tokens 30, temperature 40, truncation 60.
        paths: names of settings that are paths on this machine; clients of a server may not set
            them.
    """

    order: ClassVar[int]
    paths: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def bind(self, request: Request, vocabulary: Vocabulary) -> Control:
        """Return the control for one request.

        Raises:
            PacelineError: the request or the model lacks something that the control needs.
        """


@dataclass(frozen=True)
class Stateless(ControlMethod):
    """A method that is its own control, as it needs nothing of the request."""

    def bind(self, request: Request, vocabulary: Vocabulary) -> Control:
        """Return the method itself."""
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
    """Return for every node of a tree the tokens on the path to it, without the root."""
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.tokens[1:].tolist(), tree.parents[1:].tolist(), strict=True):
        paths.append((*paths[parent], token))
    return paths


M = TypeVar("M", bound=ControlMethod)


def chain(methods: Iterable[M]) -> tuple[M, ...]:
    """Return the methods in the order in which they are applied.

    Raises:
        MethodError: two are of one kind.
    """
    ordered = tuple(sorted(methods, key=lambda method: method.order))
    kinds = [type(method) for method in ordered]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise MethodError(f"{getattr(kind, 'name', kind.__name__)} is given twice; give one")
    return ordered


def bind(methods: Iterable[ControlMethod], request: Request, vocabulary: Vocabulary) -> Request:
    """Return `request` with the controls of `methods`, in their order.

    Raises:
        PacelineError: one of them cannot be bound.
    """
    controls = tuple(method.bind(request, vocabulary) for method in chain(methods))
    rejecting = [control for control in controls if isinstance(control, RejectsText)]
    for control in controls:
        if isinstance(control, RequiresText):
            control.check_possible(rejecting)
    return replace(request, controls=controls)


def shared(a: list[int], b: list[int]) -> int:
    """Return the length of the common prefix of two lists."""
    if b[: len(a)] == a:
        return len(a)
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def require(condition: bool, name: str, value: float, expected: str) -> None:
    """Refuse a setting unless `condition` holds.

    Raises:
        RequestError: names the setting, its value and what was expected. A NaN is always refused,
            as no comparison with it holds.
    """
    if not condition:
        raise RequestError(f"{name} is {value}, expected {expected}")
