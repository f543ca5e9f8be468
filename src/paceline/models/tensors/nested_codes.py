"""Codes of nested widths: the first bits of each are a code of a coarser table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.errors import ModelError
from paceline.models.formats.bits import packed_size
from paceline.models.tensors.base import Arrays, Index, Nested


@dataclass(frozen=True, slots=True, eq=False)
class NestedCodes(Nested):
    """Codes in planes of bits, the highest first, and tables of each row for several widths.

    Based on "Any-Precision LLM: Low-Cost Deployment of Multiple, Different-Sized LLMs".

    Attributes:
        planes: uint8 [bits, out, ceil(in / 8)], a bit for each entry, lowest first.
        tables: float16 [out, 2 ** width] for each width up to the number of planes, ascending by
            one; the widest is what codes are looked up in.
        inputs: of a row.
        losses: float32 [widths], the share of the weighted squares that is missed with each.
    """

    planes: NDArray[np.uint8]
    tables: tuple[NDArray[np.float16], ...]
    inputs: int
    losses: Floats

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        planes, inputs = self.planes, self.inputs
        if type(inputs) is not int or inputs < 0:
            raise ModelError(f"a row has {inputs!r:.40} inputs, expected a whole number")
        if (
            planes.dtype != np.uint8
            or planes.ndim != 3
            or not 1 <= len(planes) <= 8
            or planes.shape[2] != packed_size(inputs, 1)
        ):
            raise ModelError(
                f"planes are {planes.dtype} {list(planes.shape)}, expected uint8 [1 to 8, out, "
                f"{packed_size(inputs, 1)}] for {inputs} inputs"
            )
        if not 1 <= len(self.tables) <= len(planes):
            raise ModelError(f"there are {len(self.tables)} tables for {len(planes)} planes")
        for width, table in zip(self.widths, self.tables, strict=True):
            if table.dtype != np.float16 or table.shape != (planes.shape[1], 1 << width):
                raise ModelError(
                    f"a table is {table.dtype} {list(table.shape)}, expected float16 "
                    f"{[planes.shape[1], 1 << width]}"
                )
            if not np.isfinite(table).all():
                raise ModelError("tables hold NaN or infinite values")
        self._check_losses(len(self.tables))

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of a code with the first block, with the first two, and so on."""
        last = len(self.planes)
        return tuple(range(last - len(self.tables) + 1, last + 1))

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.planes.shape[1], self.inputs

    @property
    def nbytes(self) -> int:
        """Bytes of planes, tables and losses."""
        return self.planes.nbytes + sum(each.nbytes for each in self.tables) + self.losses.nbytes

    def dense(self) -> Floats:
        """Return the entries of the widest table that the codes stand for."""
        codes = np.zeros(self.shape, np.intp)
        for plane in self.planes:
            bits = np.unpackbits(plane, axis=1, count=self.inputs, bitorder="little")
            codes = codes << 1 | bits
        values = np.take_along_axis(self.tables[-1], codes, 1)
        return np.ascontiguousarray(values, np.float32)

    def first(self, count: int) -> NestedCodes:
        """Return the matrix in the first widths; of fewer than all, the widest of them alone."""
        if count >= len(self.tables):
            return self
        width, at = self.widths[count - 1], slice(count - 1, count)
        return NestedCodes(self.planes[:width], self.tables[at], self.inputs, self.losses[at])

    def rows(self, index: Index) -> NestedCodes:
        """Return some rows."""
        tables = tuple(table[index] for table in self.tables)
        return NestedCodes(self.planes[:, index], tables, self.inputs, self.losses)

    def _meta(self) -> dict[str, Any]:
        return {"inputs": self.inputs, "tables": len(self.tables)}

    def _arrays(self) -> dict[str, NDArray[Any]]:
        tables = {f"table{number}": table for number, table in enumerate(self.tables)}
        return {"planes": self.planes, "losses": self.losses, **tables}

    @classmethod
    def _build(cls, meta: Mapping[str, Any], arrays: Arrays) -> NestedCodes:
        tables = tuple(arrays[f"table{number}"] for number in range(meta["tables"]))
        return cls(arrays["planes"], tables, meta["inputs"], arrays["losses"])
