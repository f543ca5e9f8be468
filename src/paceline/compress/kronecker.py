"""Transforms of the inputs of matrices by a Kronecker product, as compression uses them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear


@dataclass(frozen=True)
class Kronecker:
    """An invertible transform P of inputs: the Kronecker product of two square matrices.

    Attributes:
        left: float32 [n, n].
        right: float32 [m, m]; inputs have n m channels.
    """

    left: Tensor
    right: Tensor

    def inputs(self, x: Tensor) -> Tensor:
        """Return the transformed inputs P x of x [..., n m]."""
        return (self.left @ self._table(x) @ self.right.T).flatten(-2)

    def into(self, weight: Tensor) -> Tensor:
        """Return what multiplies transformed inputs as a matrix [out, n m] does plain ones."""
        import torch

        left, right = torch.linalg.inv(self.left), torch.linalg.inv(self.right)
        changed: Tensor = left.T @ self._table(weight) @ right
        return changed.flatten(-2)

    def back(self, weight: Tensor) -> Tensor:
        """Return what multiplies plain inputs as a matrix [out, n m] does transformed ones."""
        return (self.left.T @ self._table(weight) @ self.right).flatten(-2)

    def halved(self) -> Kronecker:
        """Return the transform with the factors in half precision, as they are stored."""
        return Kronecker(self.left.detach().half().float(), self.right.detach().half().float())

    def wrap(self, stored: Linear) -> Linear:
        """Return the stored form of a matrix that multiplies transformed inputs."""
        import numpy as np

        from paceline.models.tensors import Dense, Transformed

        factors = (Dense(np.array(each.half().numpy()), "F16") for each in (self.left, self.right))
        return Transformed(stored, *factors)

    def _table(self, x: Tensor) -> Tensor:
        """Return the last axis of x [..., n m] as [..., n, m]."""
        return x.reshape(*x.shape[:-1], len(self.left), len(self.right))
