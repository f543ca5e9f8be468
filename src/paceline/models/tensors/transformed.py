"""Matrices that multiply inputs which a Kronecker product has transformed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.errors import ModelError
from paceline.models.tensors.base import Arrays, Index, Linear
from paceline.models.tensors.composed import part_of, prefixed


@dataclass(frozen=True, slots=True, eq=False)
class Transformed(Linear):
    """A matrix W times the Kronecker product of two small square ones, each in a form of its own.

    Inputs x, as a table [n, m], are transformed to L x R', and W multiplies the result.

    Attributes:
        matrix: W, [out, n m].
        left: L, [n, n].
        right: R, [m, m].
    """

    matrix: Linear
    left: Linear
    right: Linear

    def __post_init__(self) -> None:
        """Check that the sizes agree."""
        n, m = self.left.shape[0], self.right.shape[0]
        square = self.left.shape == (n, n) and self.right.shape == (m, m)
        if not square or self.matrix.shape[1] != n * m:
            raise ModelError(
                f"the factors of a transform are {list(self.left.shape)} and "
                f"{list(self.right.shape)}, expected square ones whose sizes multiply to the "
                f"{self.matrix.shape[1]} inputs"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.matrix.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix and both factors."""
        return self.matrix.nbytes + self.left.nbytes + self.right.nbytes

    def dense(self) -> Floats:
        """Return the product: by the left factor and then the right one, index by index."""
        left, right, rows = self.left.dense(), self.right.dense(), self.shape[0]
        values = self.matrix.dense().reshape(rows, len(left), len(right))
        half = np.zeros_like(values)
        for n in range(len(left)):
            half += values[:, n, None] * left[n][:, None]
        whole = np.zeros_like(values)
        for m in range(len(right)):
            whole += half[:, :, m, None] * right[m]
        return whole.reshape(self.shape)

    def rows(self, index: Index) -> Transformed:
        """Return some rows."""
        return Transformed(self.matrix.rows(index), self.left, self.right)

    def _meta(self) -> dict[str, Any]:
        return {}

    def _arrays(self) -> dict[str, NDArray[Any]]:
        parts = {"matrix": self.matrix, "left": self.left, "right": self.right}
        arrays: dict[str, NDArray[Any]] = {}
        for name, part in parts.items():
            arrays |= prefixed(name, part)
        return arrays

    @classmethod
    def _build(cls, meta: Mapping[str, Any], arrays: Arrays) -> Transformed:
        return cls(*(part_of(name, arrays) for name in ("matrix", "left", "right")))
