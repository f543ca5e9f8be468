"""Matrices of floating-point numbers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.errors import ModelError
from paceline.models.tensors.base import FLOATS, Arrays, Index, Linear, narrow, widen


@dataclass(frozen=True, slots=True, eq=False)
class Dense(Linear):
    """A matrix of floating-point numbers.

    Attributes:
        values: [out, in], float32, float16, or the bits of bfloat16 in uint16.
        dtype: `F32`, `F16` or `BF16`.
    """

    values: NDArray[Any]
    dtype: str = "F32"

    def __post_init__(self) -> None:
        """Check the type and the number of axes."""
        known = FLOATS.get(self.dtype)
        if known is None or self.values.dtype != known or self.values.ndim != 2:
            raise ModelError(
                f"values are {self.values.dtype} {list(self.values.shape)} for {self.dtype!r:.20}, "
                "expected two axes in F32, F16, or BF16 as uint16"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        rows, columns = self.values.shape
        return rows, columns

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.values.nbytes

    def dense(self) -> Floats:
        """Return the values, widened exactly; not a copy where they are float32 in this order."""
        return np.require(widen(self.values, self.dtype), np.float32, ["C", "A"])

    def rows(self, index: Index) -> Dense:
        """Return some rows; a view where `index` is a slice."""
        return Dense(self.values[index], self.dtype)

    def _meta(self) -> dict[str, Any]:
        return {"dtype": self.dtype}

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {"values": self.values}

    @classmethod
    def _build(cls, meta: Mapping[str, Any], arrays: Arrays) -> Dense:
        return cls(arrays["values"], meta["dtype"])


def narrowest(values: Floats) -> Dense:
    """Return a float32 matrix in the smallest type that holds it exactly."""
    for kind in ("BF16", "F16"):
        with suppress(ModelError):
            return Dense(narrow(values, kind), kind)
    return Dense(values)
