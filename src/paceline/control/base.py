"""What the files of this folder share: the contract of a control, and where it stands in order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from paceline.core import Control, Floats
from paceline.errors import RequestError


@dataclass(frozen=True)
class ControlMethod(ABC):
    """Edits the logits at a visited node; its fields are its settings.

    Attributes:
        order: controls are applied from the lowest up: penalties 20, temperature 40,
            truncation from 60.
        paper: where it is from.
    """

    order: ClassVar[int]
    paper: ClassVar[str] = ""

    @abstractmethod
    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """Return edited logits [V]; see `core.Control`."""


def chain(methods: Iterable[ControlMethod]) -> tuple[Control, ...]:
    """The methods in the order in which they are applied."""
    return tuple(sorted(methods, key=lambda method: method.order))


def keep_only(logits: Floats, kept: np.ndarray) -> Floats:
    """`logits` [V] with every token forbidden but those in the mask or index array `kept`."""
    edited = np.full_like(logits, -np.inf)
    edited[kept] = logits[kept]
    return edited


def require(condition: bool, name: str, found: float, expected: str) -> None:
    """Refuse a setting in one sentence.

    Raises:
        RequestError: unless `condition`; a NaN never meets one.
    """
    if not condition:
        raise RequestError(f"{name} is {found}, expected {expected}")
