"""Matrices made of other matrices: products of two thin ones, and sums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.errors import ModelError
from paceline.models.tensors.base import META, Arrays, Index, Linear, from_tensors, multiply


@dataclass(frozen=True, slots=True, eq=False)
class LowRank(Linear):
    """A product of two thin matrices, each in a form of its own.

    Attributes:
        left: [out, rank].
        right: [rank, in].
    """

    left: Linear
    right: Linear

    def __post_init__(self) -> None:
        """Check that the ranks agree."""
        if self.left.shape[1] != self.right.shape[0]:
            raise ModelError(
                f"the factors are {list(self.left.shape)} and {list(self.right.shape)}, expected "
                "the columns of the first to be the rows of the second"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.left.nbytes + self.right.nbytes

    def dense(self) -> Floats:
        """Return the product: outer products in the order of the ranks, each rounded and added."""
        return multiply(self.left.dense(), self.right.dense())

    def rows(self, index: Index) -> LowRank:
        """Return some rows."""
        return LowRank(self.left.rows(index), self.right)

    def _meta(self) -> dict[str, Any]:
        return {}

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {**prefixed("left", self.left), **prefixed("right", self.right)}

    @classmethod
    def _build(cls, meta: Mapping[str, Any], arrays: Arrays) -> LowRank:
        return cls(part_of("left", arrays), part_of("right", arrays))


@dataclass(frozen=True, slots=True, eq=False)
class Sum(Linear):
    """A sum of matrices of one shape, e.g. a quantised one and a low-rank correction.

    Attributes:
        parts: at least one.
    """

    parts: tuple[Linear, ...]

    def __post_init__(self) -> None:
        """Check that the shapes agree."""
        shapes = {part.shape for part in self.parts}
        if len(shapes) != 1:
            raise ModelError(f"the parts of a sum are {sorted(shapes)}, expected one shape")

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.parts[0].shape

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    def dense(self) -> Floats:
        """Return the sum of the parts, in order."""
        values = np.zeros(self.shape, np.float32)
        for part in self.parts:
            values += part.dense()
        return values

    def rows(self, index: Index) -> Sum:
        """Return some rows."""
        return Sum(tuple(part.rows(index) for part in self.parts))

    def _meta(self) -> dict[str, Any]:
        return {"parts": len(self.parts)}

    def _arrays(self) -> dict[str, NDArray[Any]]:
        arrays: dict[str, NDArray[Any]] = {}
        for number, part in enumerate(self.parts):
            arrays |= prefixed(str(number), part)
        return arrays

    @classmethod
    def _build(cls, meta: Mapping[str, Any], arrays: Arrays) -> Sum:
        return cls(tuple(part_of(str(number), arrays) for number in range(meta["parts"])))


def prefixed(prefix: str, part: Linear) -> dict[str, NDArray[Any]]:
    """Return the arrays of a part of a matrix under names that begin with `prefix`."""
    return {f"{prefix}.{name}": array for name, array in part.tensors().items()}


def part_of(prefix: str, arrays: Arrays) -> Linear:
    """Return the part of a matrix that `prefixed` saved.

    Raises:
        ModelError: it is missing.
    """
    start = f"{prefix}."
    inner = {
        name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)
    }
    if META not in inner:
        raise ModelError(f"the part {prefix} of a matrix is missing")
    return from_tensors(inner)
