"""Matrices of low rank as some of their rows, and the combinations of them that the others are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.errors import ModelError
from paceline.models.tensors.base import Arrays, Index, Linear
from paceline.models.tensors.composed import LowRank, part_of, prefixed
from paceline.models.tensors.dense import Dense


@dataclass(frozen=True, slots=True, eq=False)
class Pivoted(Linear):
    """A matrix of rank r: r of its rows, and coefficients that make the other rows of them.

    The same matrices as a product of factors [out, r] and [r, in], in r * r fewer numbers.

    Based on "Pivoting Factorization: A Compact Meta Low-Rank Representation of Sparsity for
    Efficient Inference in Large Language Models".

    Attributes:
        pivots: int32 [r], which rows are stored, in ascending order.
        basis: these rows, [r, in].
        coefficients: of the other rows in ascending order, [out - r, r].
    """

    pivots: NDArray[np.int32]
    basis: Linear
    coefficients: Linear

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        rank, rows = (
            self.basis.shape[0],
            sum(part.shape[0] for part in (self.basis, self.coefficients)),
        )
        pivots = self.pivots
        if self.coefficients.shape[1] != rank:
            raise ModelError(
                f"the coefficients are {list(self.coefficients.shape)}, expected {rank} columns, "
                "one for each stored row"
            )
        if (
            pivots.dtype != np.int32
            or pivots.shape != (rank,)
            or (rank and not 0 <= pivots[0] <= pivots[-1] < rows)
            or (np.diff(pivots) <= 0).any()
        ):
            raise ModelError(
                f"pivots are {pivots.dtype} {list(pivots.shape)}, expected int32 [{rank}], "
                f"ascending and below {rows}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.basis.shape[0] + self.coefficients.shape[0], self.basis.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the pivots, the stored rows and the coefficients."""
        return self.pivots.nbytes + self.basis.nbytes + self.coefficients.nbytes

    def dense(self) -> Floats:
        """Return the stored rows in their places, and the product of `LowRank` in the others."""
        values = np.empty(self.shape, np.float32)
        others = np.ones(len(values), bool)
        others[self.pivots] = False
        values[self.pivots] = self.basis.dense()
        values[others] = LowRank(self.coefficients, self.basis).dense()
        return values

    def rows(self, index: Index) -> Dense:
        """Return some rows as numbers."""
        return Dense(np.ascontiguousarray(self.dense()[index]))

    def _meta(self) -> dict[str, Any]:
        return {}

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {
            "pivots": self.pivots,
            **prefixed("basis", self.basis),
            **prefixed("coefficients", self.coefficients),
        }

    @classmethod
    def _build(cls, meta: Mapping[str, Any], arrays: Arrays) -> Pivoted:
        parts = (part_of(name, arrays) for name in ("basis", "coefficients"))
        return cls(arrays["pivots"], *parts)
