"""Matrices most of whose entries are zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.errors import ModelError
from paceline.models.formats.bits import packed_size
from paceline.models.tensors.base import FLOATS, Arrays, Index, Linear, unpack_rows, widen


@dataclass(frozen=True, slots=True, eq=False)
class Sparse(Linear):
    """A bitmap of the entries that are kept, and their values row by row.

    Attributes:
        mask: bool [out, in]; True is kept.
        values: [kept], float32, float16, or the bits of bfloat16 in uint16.
        dtype: `F32`, `F16` or `BF16`.
        pattern: (N, M) where N of M neighbouring inputs are kept, or None.
    """

    mask: NDArray[np.bool_]
    values: NDArray[Any]
    dtype: str = "F32"
    pattern: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        mask, known = self.mask, FLOATS.get(self.dtype)
        if mask.dtype != np.bool_ or mask.ndim != 2:
            raise ModelError(f"the mask is {mask.dtype} {list(mask.shape)}, expected bool two axes")
        kept = int(mask.sum())
        if known is None or self.values.dtype != known or self.values.shape != (kept,):
            raise ModelError(
                f"values are {self.values.dtype} {list(self.values.shape)} for {self.dtype!r:.20}, "
                f"expected the {kept} that are kept in F32, F16, or BF16 as uint16"
            )
        if not np.isfinite(widen(self.values, self.dtype)).all():
            raise ModelError("values hold NaN or infinite values")
        if self.pattern is not None:
            self._check_pattern(*self.pattern)

    def _check_pattern(self, kept: int, of: int) -> None:
        rows, columns = self.mask.shape
        if not 1 <= kept <= of or columns % of:
            raise ModelError(
                f"the pattern is {kept}:{of} for {columns} inputs, expected N:M with N up to M and "
                "M a divisor of the inputs"
            )
        if (self.mask.reshape(rows, columns // of, of).sum(-1) != kept).any():
            raise ModelError(f"the mask does not keep {kept} of every {of} neighbours")

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        rows, columns = self.mask.shape
        return rows, columns

    @property
    def nbytes(self) -> int:
        """Bytes of the bitmap and the values."""
        rows, columns = self.shape
        return rows * packed_size(columns, 1) + self.values.nbytes

    def dense(self) -> Floats:
        """Return the values in their places and zeros elsewhere."""
        out = np.zeros(self.shape, np.float32)
        out[self.mask] = widen(self.values, self.dtype)
        return out

    def rows(self, index: Index) -> Sparse:
        """Return some rows."""
        ends = np.cumsum(self.mask.sum(1))
        parts = [np.split(self.values, ends[:-1])[row] for row in np.arange(len(ends))[index]]
        values = np.concatenate([self.values[:0], *parts])
        return Sparse(self.mask[index], values, self.dtype, self.pattern)

    def _meta(self) -> dict[str, Any]:
        return {"inputs": self.shape[1], "dtype": self.dtype, "pattern": self.pattern}

    def _arrays(self) -> dict[str, NDArray[Any]]:
        packed = np.packbits(self.mask, axis=-1, bitorder="little")
        return {"mask": packed, "values": self.values}

    @classmethod
    def _build(cls, meta: Mapping[str, Any], arrays: Arrays) -> Sparse:
        bits = unpack_rows(arrays["mask"], 1, meta["inputs"])
        pattern = None if meta["pattern"] is None else tuple(meta["pattern"])
        return cls(bits.astype(bool), arrays["values"], meta["dtype"], pattern)
