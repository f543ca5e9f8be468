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
    are rounded to whole multiples of it. With a limit, all positions have one scale, and larger
    inputs are clipped. Some inputs are apart, with more bits and a scale of their own, or are not
    rounded. `dense` is the matrix alone: engines that round nothing refuse
    this form.

    Attributes:
        matrix: [out, in].
        bits: of the inputs, 2 to 8.
        apart: int32 [k], inputs with `apart_bits`, in ascending order.
        apart_bits: 2 to 8, or 16 where they are not rounded.
        limit: the largest magnitude of the inputs that are not apart, above zero, for all positions
            (a static range); None takes that of each position.
    """

    matrix: Linear
    bits: int
    apart: NDArray[np.int32]
    apart_bits: int = 8
    limit: float | None = None

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        if self.bits not in range(2, 9) or self.apart_bits not in (*range(2, 9), 16):
            raise ModelError(
                f"inputs have {self.bits} and {self.apart_bits} bits, expected 2 to 8, and 2 to 8 "
                "or 16"
            )
        if self.limit is not None and not 0 < self.limit < np.finfo(np.float32).max:
            raise ModelError(f"the limit of the inputs is {self.limit!r:.40}, expected above zero")
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
        return RoundedInputs(
            self.matrix.rows(index), self.bits, self.apart, self.apart_bits, self.limit
        )

    def _meta(self) -> dict[str, Any]:
        meta: dict[str, Any] = {"bits": self.bits, "apart_bits": self.apart_bits}
        return meta if self.limit is None else meta | {"limit": self.limit}

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {"apart": self.apart, **prefixed("matrix", self.matrix)}

    @classmethod
    def _build(cls, meta: Mapping[str, Any], arrays: Arrays) -> RoundedInputs:
        matrix = part_of("matrix", arrays)
        limit = meta.get("limit")
        if limit is not None and type(limit) is not float:
            raise ModelError(f"the limit of the inputs is {limit!r:.40}, expected a number")
        return cls(matrix, meta["bits"], arrays["apart"], meta["apart_bits"], limit)
