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
    """The places of the entries that are kept, and their values row by row.

    Places are saved as a bitmap, or as the gaps between them where that is smaller.

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
        """Bytes of the bitmap or the gaps, whichever is smaller, and the values."""
        return min(self._bitmap_size, _gaps(self.mask).nbytes) + self.values.nbytes

    @property
    def _bitmap_size(self) -> int:
        rows, columns = self.shape
        return rows * packed_size(columns, 1)

    def dense(self) -> Floats:
        """Return the values in their places and zeros elsewhere."""
        out = np.zeros(self.shape, np.float32)
        out[self.mask] = widen(self.values, self.dtype)
        return out

    def rows(self, index: Index) -> Sparse:
        """Return some rows."""
        ends = np.cumsum(self.mask.sum(1))
        parts = np.split(self.values, ends[:-1])
        chosen = [parts[row] for row in np.arange(len(ends))[index]]
        values = np.concatenate([self.values[:0], *chosen])
        return Sparse(self.mask[index], values, self.dtype, self.pattern)

    def _meta(self) -> dict[str, Any]:
        return {
            "outputs": self.shape[0],
            "inputs": self.shape[1],
            "dtype": self.dtype,
            "pattern": self.pattern,
        }

    def _arrays(self) -> dict[str, NDArray[Any]]:
        gaps = _gaps(self.mask)
        if gaps.nbytes < self._bitmap_size:
            return {"gaps": gaps, "values": self.values}
        packed = np.packbits(self.mask, axis=-1, bitorder="little")
        return {"mask": packed, "values": self.values}

    @classmethod
    def _build(cls, meta: Mapping[str, Any], arrays: Arrays) -> Sparse:
        if "gaps" in arrays:
            mask = _mask(arrays["gaps"], meta["outputs"], meta["inputs"])
        else:
            mask = unpack_rows(arrays["mask"], 1, meta["inputs"]).astype(bool)
        pattern = None if meta["pattern"] is None else tuple(meta["pattern"])
        return cls(mask, arrays["values"], meta["dtype"], pattern)


_LONG = 255  # a byte for so many entries that are not kept, and none that is


def _gaps(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return the gaps before each kept entry, row by row, and before the end; see `_mask`."""
    gaps = np.diff(np.append(np.flatnonzero(mask), mask.size), prepend=-1) - 1
    bytes_of = gaps // _LONG + 1
    packed = np.full(bytes_of.sum(), _LONG, np.uint8)
    packed[np.cumsum(bytes_of) - 1] = gaps % _LONG
    return packed


def _mask(gaps: NDArray[np.uint8], rows: int, columns: int) -> NDArray[np.bool_]:
    """Return the mask [rows, columns] that gaps describe: the inverse of `_gaps`.

    A byte below 255 is that many entries that are not kept and one that is, and 255 is 255 that
    are not. They reach to an entry after the last one, so that no file claims more than 255 times
    its size.

    Raises:
        ModelError: they reach elsewhere.
    """
    covered = np.cumsum(gaps.astype(np.int64) + (gaps < _LONG))
    total = int(covered[-1]) - 1 if len(covered) else -1
    if gaps.dtype != np.uint8 or min(rows, columns) < 0 or rows * columns != total:
        raise ModelError(
            f"gaps are {gaps.dtype} for {total} entries, expected uint8 for {rows} x {columns}"
        )
    mask = np.zeros(total + 1, bool)
    mask[covered[gaps < _LONG] - 1] = True
    return mask[:-1].reshape(rows, columns)
