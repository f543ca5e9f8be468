"""Matrices of floating-point numbers in fewer bytes, without loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.errors import ModelError
from paceline.models.tensors.base import FLOATS, Arrays, Index, Linear
from paceline.models.tensors.dense import Dense

Bytes = NDArray[np.uint8]
# Shares of zeros from which on a bitmap, with a bit for each number, may pay, and does as a rule.
_MASK_FROM, _MASK_ALWAYS = 1 / 16, 1 / 4


@dataclass(frozen=True, slots=True, eq=False)
class PackedFloats(Linear):
    """Floating-point numbers with their exponents entropy-coded, and optionally without zeros.

    The bytes of the numbers are separated: those that hold the exponent, and those of the mantissa
    that repeat themselves, are Huffman-coded, the others stored as they are, in chunks that decode
    in parallel and have checksums (`native/storage`). With a mask only the numbers that are not +0
    are stored. Every bit comes back, those of NaN and of -0 too.

    Based on "ZipNN: Lossless Compression for AI Models" (byte planes) and "Endor: Hardware-Friendly
    Sparse Format for Offloaded LLM Inference" (bitmap and packed values).

    Attributes:
        size: outputs and inputs.
        dtype: `F32`, `F16` or `BF16`.
        data: uint8 [n], the packed numbers.
        sizes: uint32 [chunks * bytes of a number], of the planes in `data`.
        checksums: uint64 [chunks], of the numbers.
        kept: how many numbers are stored.
        mask: uint8 [ceil(out * in / 8)], a bit for each number row by row, lowest first, which is
            set where it is stored; None where all are.
    """

    size: tuple[int, int]
    dtype: str
    data: Bytes
    sizes: NDArray[np.uint32]
    checksums: NDArray[np.uint64]
    kept: int
    mask: Bytes | None = None

    def __post_init__(self) -> None:
        """Check the parts; the numbers are checked when they are decoded."""
        rows, columns = self.size
        count = rows * columns
        if self.dtype not in FLOATS or min(rows, columns) < 0:
            raise ModelError(
                f"packed numbers are {self.dtype!r:.20} {list(self.size)}, expected F32, F16 or "
                "BF16 and two sizes"
            )
        if self.kept != count if self.mask is None else not 0 <= self.kept <= count:
            raise ModelError(f"{self.kept} numbers are packed for a matrix of {rows} x {columns}")
        types = {"data": np.uint8, "sizes": np.uint32, "checksums": np.uint64, "mask": np.uint8}
        for name, kind in types.items():
            part = getattr(self, name)
            if part is not None and (part.dtype != kind or part.ndim != 1):
                raise ModelError(
                    f"the {name} of packed numbers are {part.dtype} {list(part.shape)}, expected "
                    f"{np.dtype(kind)} with one axis"
                )
        if self.mask is not None and len(self.mask) != -(-count // 8):
            raise ModelError(f"a bitmap of {len(self.mask)} bytes is not one of {count} numbers")

    @classmethod
    def of(cls, matrix: Dense, masked: bool = False, threads: int = 1) -> PackedFloats:
        """Pack a matrix.

        Args:
            matrix: its bits are kept.
            masked: leave out what is +0, and store a bitmap.
            threads: that pack at the same time.
        """
        from paceline import _native

        values = np.ascontiguousarray(matrix.values).reshape(-1)
        mask = None
        if masked:
            stored = values.view(_bits(matrix.dtype)) != 0
            values, mask = values[stored], np.packbits(stored, bitorder="little")
        width = values.dtype.itemsize
        data, sizes, sums = _native.pack_floats(values.view(np.uint8), width, threads)
        return cls(matrix.shape, matrix.dtype, data, sizes, sums, len(values), mask)

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.size

    @property
    def nbytes(self) -> int:
        """Bytes of the packed numbers, the bitmap, and what decoding needs."""
        arrays = (self.data, self.sizes, self.checksums, self.mask)
        return sum(array.nbytes for array in arrays if array is not None)

    def unpack(self, threads: int = 1) -> Dense:
        """Return the numbers as they were packed.

        Raises:
            ModelError: they are damaged.
        """
        from paceline import _native

        kind = np.dtype(FLOATS[self.dtype])
        rows, columns = self.size
        try:
            values = _native.unpack_floats(
                np.ascontiguousarray(self.data),
                np.require(self.sizes, requirements=["C", "A"]),  # a file may hold them unaligned
                np.require(self.checksums, requirements=["C", "A"]),
                self.kept,
                kind.itemsize,
                threads,
            )
            if self.mask is not None:
                mask = np.ascontiguousarray(self.mask)
                values = _native.expand_mask(mask, values, rows * columns, kind.itemsize, threads)
        except (ValueError, TypeError) as error:  # TypeError: a count that no integer holds
            reason = "sizes beyond all memory" if isinstance(error, TypeError) else error
            raise ModelError(
                f"packed numbers cannot be read: {reason}; download or convert it again"
            ) from None
        return Dense(values.view(kind).reshape(self.size), self.dtype)

    def dense(self) -> Floats:
        """Return the numbers, widened exactly."""
        return self.unpack().dense()

    def rows(self, index: Index) -> Dense:
        """Return some rows, unpacked."""
        return self.unpack().rows(index)

    def _meta(self) -> dict[str, Any]:
        return {"size": list(self.size), "dtype": self.dtype, "kept": self.kept}

    def _arrays(self) -> dict[str, NDArray[Any]]:
        names = ("data", "sizes", "checksums", "mask")
        arrays = {name: getattr(self, name) for name in names}
        return {name: array for name, array in arrays.items() if array is not None}

    @classmethod
    def _build(cls, meta: Mapping[str, Any], arrays: Arrays) -> PackedFloats:
        rows, columns = meta["size"]
        if any(type(number) is not int for number in (rows, columns, meta["kept"])):
            raise ValueError("sizes are no whole numbers")
        data, sizes, sums = (arrays[name] for name in ("data", "sizes", "checksums"))
        mask = arrays.get("mask")
        return cls((rows, columns), meta["dtype"], data, sizes, sums, meta["kept"], mask)


def pack_smallest(matrix: Dense, threads: int = 1) -> Dense | PackedFloats:
    """Return a matrix in the smallest of its forms: as it is, packed, or packed without zeros."""
    bits = np.ascontiguousarray(matrix.values).view(_bits(matrix.dtype))
    zeros = (bits.size - np.count_nonzero(bits)) / max(bits.size, 1)
    maskings = [False] if zeros < _MASK_ALWAYS else []
    if zeros > _MASK_FROM:
        maskings.append(True)
    forms = [PackedFloats.of(matrix, masked, threads) for masked in maskings]
    best = min(forms, key=lambda form: form.nbytes)
    return best if best.nbytes < matrix.nbytes else matrix


def _bits(dtype: str) -> type[np.generic]:
    return np.uint32 if dtype == "F32" else np.uint16
