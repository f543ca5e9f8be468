"""Stored matrices as parameters that gradients reach."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from paceline.compress.base import Block
from paceline.compress.kronecker import Kronecker
from paceline.compress.reconstruct.norms import Norms
from paceline.compress.reconstruct.objective import dense_weights

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


class TransformedPart(Trainable):
    """A trained matrix that multiplies transformed inputs; the transform stays.

    Args:
        part: the matrix.
        basis: the transform.
    """

    def __init__(self, part: Trainable, basis: Kronecker) -> None:
        self._part, self._basis = part, basis

    def groups(self) -> list[tuple[Tensor, float]]:
        """Return the parameters of the matrix."""
        return self._part.groups()

    def weight(self) -> Tensor:
        """Return the matrix that multiplies plain inputs."""
        return self._basis.back(self._part.weight())

    def stored(self) -> Linear:
        """Return the matrix with the transform beside it."""
        return self._basis.wrap(self._part.stored())


class TrainedBlock:
    """A block whose matrices and norms are trained.

    Args:
        block: with the weights as they were before they were compressed.
        stored: the compressed matrices.
        parts: those that are trained.

    Attributes:
        block: as given.
        parts: as given.
        norms: the norms.
    """

    def __init__(
        self, block: Block, stored: Mapping[str, Linear], parts: Mapping[str, Trainable]
    ) -> None:
        rest = {name: each for name, each in stored.items() if name not in parts}
        self._fixed = dense_weights(block, rest)
        self.block, self.parts, self.norms = (
            block,
            parts,
            Norms(block.weights, block.config.norm_offset),
        )

    def groups(self) -> list[tuple[Tensor, float]]:
        """Return all parameters, each with its factor of the learning rate."""
        parts = [pair for part in self.parts.values() for pair in part.groups()]
        return [*parts, *self.norms.groups()]

    def weights(self) -> dict[str, Tensor]:
        """Return the weights of the block, differentiable."""
        matrices = {name: part.weight() for name, part in self.parts.items()}
        return self._fixed | self.norms.weights() | matrices
