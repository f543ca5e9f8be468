"""Integers in groups whose scales are small integers themselves, times a number for each row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.errors import ModelError
from paceline.models.formats.bits import Codes, pack_bits, packed_size
from paceline.models.tensors.base import (
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
from paceline.models.tensors.grouped import Grouped


@dataclass(frozen=True, slots=True, eq=False)
class TwoGrained(Linear):
    """Codes in groups with fine scales, which are integers times a coarse scale for each row.

    The scale of a group is `units * steps`, rounded to half precision; a value is the scale times
    `code - zero`, or times `levels[code]` where there is a table.

    Attributes:
        bits: of a code, 2 to 8.
        codes: uint8 [out, in].
        group: inputs that share a scale; the last group of a row may be smaller.
        steps: uint8 [out, groups], below `2 ** step_bits`: the fine scales.
        step_bits: 2 to 8.
        units: float32 [out] that half precision holds: the coarse scales.
        zeros: uint8 [out, groups], below `2 ** bits`; None is `2 ** (bits - 1)`.
        levels: int8 [2 ** bits], what codes stand for instead of `code - zero`; or None.
    """

    bits: int
    codes: Codes
    group: int
    steps: Codes
    step_bits: int
    units: Floats
    zeros: Codes | None = None
    levels: NDArray[np.int8] | None = None

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        for name, width in (("codes", self.bits), ("scales", self.step_bits)):
            if not 2 <= width <= 8:
                raise ModelError(f"{name} have {width} bits, expected 2 to 8")
        check_group(self.group)
        if self.codes.ndim != 2:
            raise ModelError(f"codes are {list(self.codes.shape)}, expected [out, in]")
        rows, columns = self.codes.shape
        groups = (rows, -(-columns // self.group))
        _check_codes("codes", self.codes, (rows, columns), self.bits)
        _check_codes("steps", self.steps, groups, self.step_bits)
        check_floats("units", self.units, (rows,))
        if self.zeros is not None:
            _check_codes("zeros", self.zeros, groups, self.bits)
        if self.levels is not None:
            if self.levels.dtype != np.int8 or self.levels.shape != (1 << self.bits,):
                raise ModelError(
                    f"levels are {self.levels.dtype} {list(self.levels.shape)}, expected int8 "
                    f"[{1 << self.bits}]"
                )
            if self.zeros is not None:
                raise ModelError("a matrix has zero points or a table of levels, not both")
        if not np.isfinite(self.scales).all():
            raise ModelError("units are too large for scales in half precision")

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        rows, columns = self.codes.shape
        return rows, columns

    @property
    def scales(self) -> Floats:
        """The scale of each group, float32 [out, groups]."""
        with np.errstate(over="ignore"):
            product = self.units[:, None] * self.steps.astype(np.float32)
            return product.astype(np.float16).astype(np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of packed codes, both kinds of scales, zero points and levels."""
        (rows, columns), groups = self.shape, self.steps.shape[1]
        return (
            rows * packed_size(columns, self.bits)
            + rows * packed_size(groups, self.step_bits)
            + 2 * rows
            + (0 if self.zeros is None else rows * packed_size(groups, self.bits))
            + (0 if self.levels is None else self.levels.nbytes)
        )

    @property
    def grouped(self) -> Grouped | None:
        """The same matrix with a half-precision scale for each group; None with levels."""
        if self.levels is not None:
            return None
        zeros = None if self.zeros is None else self.zeros.astype(np.uint16)
        return Grouped(self.bits, self.codes, self.scales, self.group, zeros, scale_type="F16")

    def dense(self) -> Floats:
        """Return `(codes - zeros) * scales` or `levels[codes] * scales`, rounded once."""
        at = np.arange(self.shape[1]) // self.group
        if self.levels is not None:
            values = self.levels.astype(np.float32)[self.codes]
        else:
            values = self.codes.astype(np.float32)
            half = np.float32(1 << (self.bits - 1))
            values -= half if self.zeros is None else self.zeros.astype(np.float32)[:, at]
        values *= self.scales[:, at]
        return values

    def rows(self, index: Index) -> TwoGrained:
        """Return some rows."""
        return TwoGrained(
            self.bits,
            self.codes[index],
            self.group,
            self.steps[index],
            self.step_bits,
            self.units[index],
            take(self.zeros, index),
            self.levels,
        )

    def _meta(self) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "inputs": self.shape[1],
            "group": self.group,
            "step_bits": self.step_bits,
            "table": self.levels is not None,
        }

    def _arrays(self) -> dict[str, NDArray[Any]]:
        parts = {
            "codes": pack_bits(self.codes, self.bits),
            "steps": pack_bits(self.steps, self.step_bits),
            "units": narrow(self.units, "F16"),
            "zeros": None if self.zeros is None else pack_bits(self.zeros, self.bits),
            "levels": self.levels,
        }
        return {name: part for name, part in parts.items() if part is not None}

    @classmethod
    def _build(cls, meta: Mapping[str, Any], arrays: Arrays) -> TwoGrained:
        bits, inputs, group = meta["bits"], meta["inputs"], meta["group"]
        check_group(group)
        groups, zeros = -(-inputs // group), arrays.get("zeros")
        return cls(
            bits,
            unpack_rows(arrays["codes"], bits, inputs),
            group,
            unpack_rows(arrays["steps"], meta["step_bits"], groups),
            meta["step_bits"],
            widen(arrays["units"], "F16"),
            None if zeros is None else unpack_rows(zeros, bits, groups),
            arrays["levels"] if meta["table"] else None,
        )


def _check_codes(name: str, codes: Codes, shape: tuple[int, int], bits: int) -> None:
    """Refuse integers of another type or shape, or that do not fit their bits."""
    if codes.dtype != np.uint8 or codes.shape != shape or codes.max(initial=0) >= 1 << bits:
        raise ModelError(
            f"{name} are {codes.dtype} {list(codes.shape)}, expected uint8 {list(shape)} below "
            f"{1 << bits}"
        )
