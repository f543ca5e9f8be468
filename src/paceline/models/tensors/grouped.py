"""Integers of 2 to 8 bits in groups that share a scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.errors import ModelError
from paceline.models.formats.bits import Codes, pack_bits, packed_size
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

_ENOUGH = 0.9  # of the bytes of all codes, below which those of zeros are left out


@dataclass(frozen=True, slots=True, eq=False)
class Grouped(Linear):
    """Integers with a scale for each group of inputs of a row.

    With zero points, `(code - zero) * scale`, one rounding. With minima, `code * scale` is rounded
    and then added to the minimum. Where it makes the codes a tenth smaller, those that stand for
    zero are saved as a bitmap only.

    Attributes:
        bits: of a code, 2 to 8.
        codes: uint8 [out, in].
        scales: float32 [out, groups].
        group: inputs that share a scale; the last group of a row may be smaller.
        zeros: zero points, uint16 [out, groups], 0 to `2 ** bits`; None is `2 ** (bits - 1)`.
        minima: float32 [out, groups], instead of zero points; or None.
        g_idx: int32 [in], the group of each input; None is `input // group`.
        scale_type: type in which scales and minima are saved, `F32`, `F16` or `BF16`; it holds
            them exactly.
    """

    bits: int
    codes: Codes
    scales: Floats
    group: int
    zeros: NDArray[np.uint16] | None = None
    minima: Floats | None = None
    g_idx: NDArray[np.int32] | None = None
    scale_type: str = "F32"

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        if not 2 <= self.bits <= 8:
            raise ModelError(f"codes have {self.bits} bits, expected 2 to 8")
        check_group(self.group)
        codes, top = self.codes, 1 << self.bits
        if codes.dtype != np.uint8 or codes.ndim != 2 or (codes.size and codes.max() >= top):
            raise ModelError(
                f"codes are {codes.dtype} {list(codes.shape)}, expected uint8 below {top}"
            )
        rows, columns = codes.shape
        groups = -(-columns // self.group)
        if self.g_idx is not None and self.scales.ndim == 2:
            groups = self.scales.shape[1]
        check_floats("scales", self.scales, (rows, groups))
        if self.scale_type not in FLOATS:
            raise ModelError(
                f"scales are saved as {self.scale_type!r:.20}, expected F32, F16 or BF16"
            )
        if self.minima is not None:
            check_floats("minima", self.minima, (rows, groups))
            if self.zeros is not None:
                raise ModelError("a matrix has zero points or minima, not both")
        largest = max(
            np.abs(part).max(initial=0) for part in (self.scales, self.minima) if part is not None
        )
        if largest > np.finfo(np.float32).max / (2 * top):
            raise ModelError(
                f"scales or minima reach {largest:g}, expected products with codes to be finite"
            )
        self._check_integers(columns, groups)

    def _check_integers(self, columns: int, groups: int) -> None:
        zeros, order, top = self.zeros, self.g_idx, 1 << self.bits
        if zeros is not None and (
            zeros.dtype != np.uint16
            or zeros.shape != self.scales.shape
            or (zeros.size and zeros.max() > top)
        ):
            raise ModelError(
                f"zero points are {zeros.dtype} {list(zeros.shape)}, expected uint16 "
                f"{list(self.scales.shape)} up to {top}"
            )
        if order is not None and (
            order.dtype != np.int32
            or order.shape != (columns,)
            or (columns and not 0 <= order.min() <= order.max() < groups)
        ):
            raise ModelError(
                f"g_idx is {order.dtype} {list(order.shape)}, expected int32 [{columns}] below "
                f"the number of groups, {groups}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        rows, columns = self.codes.shape
        return rows, columns

    @property
    def nbytes(self) -> int:
        """Bytes of packed codes, scales, zero points or minima, and g_idx."""
        floats = 1 + (self.minima is not None)
        return (
            self._code_bytes(self._kept)
            + floats * self.scales.size * np.dtype(FLOATS[self.scale_type]).itemsize
            + (0 if self.zeros is None else self._zero_bytes)
            + (0 if self.g_idx is None else self.g_idx.nbytes)
        )

    @property
    def _zero_codes(self) -> NDArray[np.uint8] | None:
        """The code that stands for zero, [out, in] or [1, 1]; None where there is no such code."""
        if self.minima is not None or (self.zeros is not None and self._zero_bits > self.bits):
            return None
        if self.zeros is None:
            return np.array([[1 << (self.bits - 1)]], np.uint8)
        return self.zeros.astype(np.uint8)[:, self.groups]

    @property
    def _kept(self) -> NDArray[np.bool_] | None:
        """Which codes are saved, [out, in]; None where all are."""
        zero = self._zero_codes
        if zero is None:
            return None
        kept: NDArray[np.bool_] = self.codes != zero
        return kept if self._code_bytes(kept) <= _ENOUGH * self._code_bytes(None) else None

    def _code_bytes(self, kept: NDArray[np.bool_] | None) -> int:
        rows, columns = self.shape
        if kept is None:
            return rows * packed_size(columns, self.bits)
        return rows * packed_size(columns, 1) + packed_size(int(kept.sum()), self.bits)

    @property
    def groups(self) -> NDArray[np.intp]:
        """The group of each input, [in]."""
        if self.g_idx is not None:
            return self.g_idx.astype(np.intp)
        return np.arange(self.shape[1]) // self.group

    @property
    def _zero_bits(self) -> int:
        """Bits of a zero point as it is saved: those of a code where all of them fit."""
        assert self.zeros is not None
        return self.bits if int(self.zeros.max(initial=0)) < 1 << self.bits else 16

    @property
    def _zero_bytes(self) -> int:
        rows, groups = self.scales.shape
        return int(rows * packed_size(groups, self._zero_bits))

    def dense(self) -> Floats:
        """Return `(codes - zeros) * scales`, or `codes * scales + minima`."""
        values, at = self.codes.astype(np.float32), self.groups
        if self.minima is not None:
            values *= self.scales[:, at]
            values += self.minima[:, at]
            return values
        if self.zeros is None:
            values -= np.float32(1 << (self.bits - 1))
        else:
            values -= self.zeros.astype(np.float32)[:, at]
        values *= self.scales[:, at]
        return values

    def rows(self, index: Index) -> Grouped:
        """Return some rows."""
        return Grouped(
            self.bits,
            self.codes[index],
            self.scales[index],
            self.group,
            take(self.zeros, index),
            take(self.minima, index),
            self.g_idx,
            self.scale_type,
        )

    def _meta(self) -> dict[str, Any]:
        meta = {
            "bits": self.bits,
            "inputs": self.shape[1],
            "group": self.group,
            "scale_type": self.scale_type,
        }
        if self.zeros is not None and self._zero_bits < 16:
            meta["zero_bits"] = self._zero_bits
        return meta

    def _arrays(self) -> dict[str, NDArray[Any]]:
        zeros: NDArray[Any] | None = self.zeros
        if self.zeros is not None and self._zero_bits < 16:
            zeros = pack_bits(self.zeros.astype(np.uint8), self._zero_bits)
        kept = self._kept
        parts = {
            "mask": None if kept is None else np.packbits(kept, axis=-1, bitorder="little"),
            "codes": pack_bits(self.codes if kept is None else self.codes[kept], self.bits),
            "scales": narrow(self.scales, self.scale_type),
            "zeros": zeros,
            "minima": None if self.minima is None else narrow(self.minima, self.scale_type),
            "g_idx": self.g_idx,
        }
        return {name: part for name, part in parts.items() if part is not None}

    @classmethod
    def _build(cls, meta: Mapping[str, Any], arrays: Arrays) -> Grouped:
        kind, minima, zeros = meta["scale_type"], arrays.get("minima"), arrays.get("zeros")
        if zeros is not None and "zero_bits" in meta:
            count = arrays["scales"].shape[-1]
            zeros = unpack_rows(zeros, meta["zero_bits"], count).astype(np.uint16)
        bits, inputs, packed, kept = meta["bits"], meta["inputs"], arrays["codes"], None
        if "mask" in arrays:
            kept = unpack_rows(arrays["mask"], 1, inputs).astype(bool)
            codes = np.zeros(kept.shape, np.uint8)
        else:
            codes = unpack_rows(packed, bits, inputs)
        matrix = cls(
            bits,
            codes,
            widen(arrays["scales"], kind),
            meta["group"],
            zeros,
            None if minima is None else widen(minima, kind),
            arrays.get("g_idx"),
            kind,
        )
        return matrix if kept is None else matrix._completed(kept, packed)

    def _completed(self, kept: NDArray[np.bool_], packed: Codes) -> Grouped:
        """Return the matrix with the codes where `kept` says so, and those of zero elsewhere."""
        zero = self._zero_codes
        if zero is None:
            raise ModelError("codes are missing that stand for zero, which none does")
        codes = np.where(kept, np.uint8(0), zero)
        codes[kept] = unpack_rows(packed, self.bits, int(kept.sum()))
        return replace(self, codes=codes)
