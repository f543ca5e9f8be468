"""Matrices whose inputs are rounded to few bits before they are multiplied."""

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
class RoundedInputs(Linear):
    """A matrix, and how the inputs of its products are rounded.

    The inputs of a position have a scale, their largest magnitude over `2 ** (bits - 1) - 1`, and
    are rounded to whole multiples of it. Some inputs are apart, with more bits and a scale of
    their own, or are not rounded. `dense` is the matrix alone: engines that round nothing refuse
    this form.

    Attributes:
        matrix: [out, in].
        bits: of the inputs, 2 to 8.
        apart: int32 [k], inputs with `apart_bits`, in ascending order.
        apart_bits: 2 to 8, or 16 where they are not rounded.
    """

    matrix: Linear
    bits: int
    apart: NDArray[np.int32]
    apart_bits: int = 8

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        if self.bits not in range(2, 9) or self.apart_bits not in (*range(2, 9), 16):
            raise ModelError(
                f"inputs have {self.bits} and {self.apart_bits} bits, expected 2 to 8, and 2 to 8 "
                "or 16"
            )
        apart, inputs = self.apart, self.matrix.shape[1]
        if (
            apart.dtype != np.int32
            or apart.ndim != 1
            or (len(apart) and not (apart[0] >= 0 and apart[-1] < inputs))
            or (np.diff(apart) <= 0).any()
        ):
            raise ModelError(
                f"the inputs apart are {apart.dtype} {list(apart.shape)}, expected int32 "
                f"ascending below {inputs}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.matrix.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix and of the inputs apart."""
        return self.matrix.nbytes + self.apart.nbytes

    def dense(self) -> Floats:
        """Return the matrix; see the class."""
        return self.matrix.dense()

    def rows(self, index: Index) -> RoundedInputs:
        """Return some rows."""
        return RoundedInputs(self.matrix.rows(index), self.bits, self.apart, self.apart_bits)

    def _meta(self) -> dict[str, Any]:
        return {"bits": self.bits, "apart_bits": self.apart_bits}

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {"apart": self.apart, **prefixed("matrix", self.matrix)}

    @classmethod
    def _build(cls, meta: Mapping[str, Any], arrays: Arrays) -> RoundedInputs:
        matrix = part_of("matrix", arrays)
        return cls(matrix, meta["bits"], arrays["apart"], meta["apart_bits"])
