"""Vectors of weights looked up in tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.errors import ModelError
from paceline.models.formats.bits import pack_bits, packed_size
from paceline.models.tensors.base import (
    FLOATS,
    Arrays,
    Index,
    Linear,
    check_floats,
    check_group,
    narrow,
    take,
    unpack_rows,
    widen,
)


@dataclass(frozen=True, slots=True, eq=False)
class Codebook(Linear):
    """Vectors of inputs looked up in tables, summed table by table, then scaled.

    Attributes:
        codes: uint16 [out, in / dim, tables]: which entry of each table.
        entries: float32 [tables, 1 or out, entries, dim]: shared by all rows, or one for each.
        scales: float32 [out, groups], or None.
        group: inputs that share a scale.
        float_type: type in which entries and scales are saved, `F32`, `F16` or `BF16`; it holds
            them exactly.
    """

    codes: NDArray[np.uint16]
    entries: Floats
    scales: Floats | None = None
    group: int = 1
    float_type: str = "F32"

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        codes, entries = self.codes, self.entries
        if codes.dtype != np.uint16 or codes.ndim != 3 or not codes.shape[2]:
            raise ModelError(
                f"codes are {codes.dtype} {list(codes.shape)}, expected uint16 "
                "[out, vectors, tables]"
            )
        if entries.ndim != 4 or entries.shape[1] not in (1, len(codes)) or not entries.size:
            raise ModelError(
                f"entries are {list(entries.shape)}, expected [tables, 1 or {len(codes)}, "
                "entries, dim]"
            )
        check_floats("entries", entries, (codes.shape[2], *entries.shape[1:]))
        if codes.size and codes.max() >= entries.shape[2]:
            raise ModelError(f"a code is {codes.max()}, and there are {entries.shape[2]} entries")
        check_group(self.group)
        if self.float_type not in FLOATS:
            raise ModelError(
                f"floats are saved as {self.float_type!r:.20}, expected F32, F16 or BF16"
            )
        if self.scales is not None:
            check_floats("scales", self.scales, (len(codes), -(-self.shape[1] // self.group)))

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.codes.shape[0], self.codes.shape[1] * self.entries.shape[3]

    @property
    def _bits(self) -> int:
        """Bits of a saved code: 1 to 8, or 16."""
        return _code_bits(self.entries)

    @property
    def nbytes(self) -> int:
        """Bytes of packed codes, entries and scales."""
        rows, vectors, tables = self.codes.shape
        floats = self.entries.size + (0 if self.scales is None else self.scales.size)
        each = np.dtype(FLOATS[self.float_type]).itemsize
        return int(rows * packed_size(vectors * tables, self._bits) + floats * each)

    def dense(self) -> Floats:
        """Return the sum of the entries, in the order of the tables, times the scales."""
        rows = np.arange(len(self.codes))[:, None] % self.entries.shape[1]
        parts = [
            self.entries[table, rows, self.codes[:, :, table]]
            for table in range(self.codes.shape[2])
        ]
        values = np.ascontiguousarray(reduce(np.add, parts)).reshape(self.shape)
        if self.scales is None:
            return values
        return np.asarray(values * self.scales[:, np.arange(self.shape[1]) // self.group])

    def rows(self, index: Index) -> Codebook:
        """Return some rows."""
        entries = self.entries if self.entries.shape[1] == 1 else self.entries[:, index]
        scales = take(self.scales, index)
        return Codebook(self.codes[index], entries, scales, self.group, self.float_type)

    def _meta(self) -> dict[str, Any]:
        return {"codes": self.codes.shape, "group": self.group, "float_type": self.float_type}

    def _arrays(self) -> dict[str, NDArray[Any]]:
        codes: NDArray[Any] = self.codes.reshape(len(self.codes), -1)
        if self._bits < 16:
            codes = pack_bits(codes.astype(np.uint8), self._bits)
        arrays = {"codes": codes, "entries": narrow(self.entries, self.float_type)}
        if self.scales is not None:
            arrays["scales"] = narrow(self.scales, self.float_type)
        return arrays

    @classmethod
    def _build(cls, meta: Mapping[str, Any], arrays: Arrays) -> Codebook:
        shape, codes, entries = meta["codes"], arrays["codes"], arrays["entries"]
        if codes.dtype == np.uint8:
            codes = unpack_rows(codes, _code_bits(entries), shape[1] * shape[2])
        codes = codes.astype(np.uint16).reshape(shape)
        kind, scales = meta.get("float_type", "F32"), arrays.get("scales")
        scales = None if scales is None else widen(scales, kind)
        return cls(codes, widen(entries, kind), scales, meta["group"], kind)


def _code_bits(entries: Floats) -> int:
    """Return the bits of a saved code: 1 to 8, or 16."""
    bits = max(1, int(entries.shape[2] - 1).bit_length())
    return bits if bits <= 8 else 16
