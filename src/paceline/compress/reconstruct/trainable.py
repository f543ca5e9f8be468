"""Stored matrices as parameters that gradients reach."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear


class Trainable(ABC):
    """A stored matrix whose numbers are trained."""

    @abstractmethod
    def groups(self) -> list[tuple[Tensor, float]]:
        """Return the parameters, each with its factor of the learning rate."""

    @abstractmethod
    def weight(self) -> Tensor:
        """Return the matrix that the parameters stand for, float32 [out, in], differentiable."""

    @abstractmethod
    def stored(self) -> Linear:
        """Return the matrix as it will be stored."""
