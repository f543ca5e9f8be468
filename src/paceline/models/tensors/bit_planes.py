"""Sums of scaled sign matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.errors import ModelError
from paceline.models.formats.bits import packed_size
from paceline.models.tensors.base import (
    Arrays,
    Index,
    Linear,
    check_floats,
    check_group,
    take,
    unpack_rows,
)


@dataclass(frozen=True, slots=True, eq=False)
class BitPlanes(Linear):
    """A sum of planes of +1 and -1, each with a scale for each group of inputs of a row.

    Attributes:
        planes: bool [planes, out, in]; True is +1.
        scales: float32 [planes, out, groups].
        group: inputs that share a scale; the last group of a row may be smaller.
        offsets: float32 [out, groups] that are added last, or None.
    """

    planes: NDArray[np.bool_]
    scales: Floats
    group: int
    offsets: Floats | None = None

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        planes = self.planes
        if planes.dtype != np.bool_ or planes.ndim != 3 or not len(planes):
            raise ModelError(
                f"planes are {planes.dtype} {list(planes.shape)}, expected bool [planes, out, in]"
            )
        check_group(self.group)
        groups = -(-planes.shape[2] // self.group)
        check_floats("scales", self.scales, (*planes.shape[:2], groups))
        if self.offsets is not None:
            check_floats("offsets", self.offsets, (planes.shape[1], groups))

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.planes.shape[1], self.planes.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of packed planes, scales and offsets."""
        planes, rows, columns = self.planes.shape
        offsets = 0 if self.offsets is None else self.offsets.nbytes
        return int(planes * rows * packed_size(columns, 1) + self.scales.nbytes + offsets)

    def dense(self) -> Floats:
        """Return the sum of the planes' signed scales, in order, and of the offsets."""
        at = np.arange(self.shape[1]) // self.group
        values = np.zeros(self.shape, np.float32)
        for plane, scales in zip(self.planes, self.scales, strict=True):
            sizes = scales[:, at]
            values += np.where(plane, sizes, -sizes)
        if self.offsets is not None:
            values += self.offsets[:, at]
        return values

    def rows(self, index: Index) -> BitPlanes:
        """Return some rows."""
        offsets = take(self.offsets, index)
        return BitPlanes(self.planes[:, index], self.scales[:, index], self.group, offsets)

    def _meta(self) -> dict[str, Any]:
        return {"inputs": self.shape[1], "group": self.group}

    def _arrays(self) -> dict[str, NDArray[Any]]:
        offsets = {} if self.offsets is None else {"offsets": self.offsets}
        packed = np.packbits(self.planes, axis=-1, bitorder="little")
        return {"planes": packed, "scales": self.scales, **offsets}

    @classmethod
    def _build(cls, meta: Mapping[str, Any], arrays: Arrays) -> BitPlanes:
        bits = unpack_rows(arrays["planes"], 1, meta["inputs"])
        return cls(bits.astype(bool), arrays["scales"], meta["group"], arrays.get("offsets"))
