"""Matrices of codes in rows, as the native kernels of tables and of small groups take them.

A row is its header and its codes, 64 inputs at a time in planes of bits; see
`native/kernels/formats/unit_codes.hpp`, `row_tables.hpp` and `fine_groups.hpp`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.models.tensors import Codebook, Grouped, Linear, NestedCodes, TwoGrained

Bytes = NDArray[np.uint8]
GROUPS = (4, 8, 16)  # inputs that share a scale; larger groups have kernels of their own
_UNIT = 64  # inputs whose planes lie together
_TABLES, _FINE = range(2, 9), range(2, 5)  # bits of a code


@dataclass(frozen=True, eq=False)
class Rows:
    """A matrix as a format of rows takes it.

    Attributes:
        format: its name.
        data: uint8 [out, bytes of a row].
        inputs: of a row.
        group: inputs that share a scale; 1 for tables.
    """

    format: str
    data: Bytes
    inputs: int
    group: int = 1

    def group_in(self, name: str) -> int:
        """Return the `group` that `set_format` takes."""
        return self.group

    def bits_in(self, name: str) -> float:
        """Bits of a weight."""
        return float(8 * self.data.shape[1] / self.inputs)

    @classmethod
    def of(cls, matrix: Linear) -> Rows | None:
        """Return a matrix in rows; None where no format of rows holds it as it is."""
        if isinstance(matrix, NestedCodes):
            return cls._of_table(_nested_codes(matrix), matrix.tables[-1])
        if isinstance(matrix, Codebook):
            return cls._of_codebook(matrix)
        if isinstance(matrix, TwoGrained):
            return cls._of_steps(matrix)
        return cls._of_halves(matrix) if isinstance(matrix, Grouped) else None

    @classmethod
    def _of_table(cls, codes: Bytes, table: NDArray[np.float16]) -> Rows | None:
        """Return codes [out, in] that name halves of a table [out, entries]."""
        bits = max(2, int(table.shape[1] - 1).bit_length())
        if bits not in _TABLES:
            return None
        whole = np.zeros((len(table), 1 << bits), "<f2")
        whole[:, : table.shape[1]] = table
        data = np.concatenate([whole.view(np.uint8), pack_units(codes, bits)], 1)
        return cls(f"table{bits}", data, codes.shape[1])

    @classmethod
    def _of_codebook(cls, matrix: Codebook) -> Rows | None:
        """Return a codebook of single numbers in one table."""
        tables, _, count, dim = matrix.entries.shape
        if (tables, dim) != (1, 1) or count > 1 << _TABLES[-1]:
            return None
        codes = matrix.codes[:, :, 0].astype(np.uint8)
        entries = np.broadcast_to(matrix.entries[0, :, :, 0], (len(codes), count))
        if matrix.scales is not None:
            return cls._of_scaled(matrix, codes, entries)
        halves = _halves(entries)
        return None if halves is None else cls._of_table(codes, halves)

    @classmethod
    def _of_scaled(cls, matrix: Codebook, codes: Bytes, entries: Floats) -> Rows | None:
        """Return a codebook of whole numbers with a half-precision scale for each group."""
        assert matrix.scales is not None
        levels, halves = entries.astype(np.int8), _halves(matrix.scales)
        bits = max(_FINE[0], (entries.shape[1] - 1).bit_length())
        whole = np.array_equal(levels.astype(np.float32), entries)
        if (
            matrix.group not in (*GROUPS, 32, 64)
            or bits not in _FINE
            or not whole
            or halves is None
        ):
            return None
        padded = np.zeros((len(levels), 1 << bits), np.int8)
        padded[:, : levels.shape[1]] = levels
        scales = np.ascontiguousarray(halves).view(np.uint8)
        return cls._of_levels(f"fine{bits}_fp16", codes, matrix.group, _ones(codes), padded, scales)

    @classmethod
    def _of_steps(cls, matrix: TwoGrained) -> Rows | None:
        """Return codes whose scales are whole multiples of a number of the row."""
        if matrix.group not in GROUPS or matrix.bits not in _FINE or matrix.zeros is not None:
            return None
        units = matrix.units[:, None].astype("<f2").view(np.uint8)
        levels = _even(matrix.bits) if matrix.levels is None else matrix.levels
        return cls._of_levels(
            f"fine{matrix.bits}", matrix.codes, matrix.group, units, levels, matrix.steps
        )

    @classmethod
    def _of_halves(cls, matrix: Grouped) -> Rows | None:
        """Return codes around half the range whose scales are half-precision numbers."""
        plain = matrix.zeros is None and matrix.minima is None and matrix.g_idx is None
        if matrix.group not in GROUPS or matrix.bits not in _FINE or not plain:
            return None
        halves = _halves(matrix.scales)
        if halves is None:
            return None
        scales, codes = np.ascontiguousarray(halves).view(np.uint8), matrix.codes
        name, levels = f"fine{matrix.bits}_fp16", _even(matrix.bits)
        return cls._of_levels(name, codes, matrix.group, _ones(codes), levels, scales)

    @classmethod
    def _of_levels(
        cls,
        name: str,
        codes: Bytes,
        group: int,
        numbers: Bytes,
        levels: NDArray[np.int8],
        scales: Bytes,
    ) -> Rows:
        """Return rows of a number, levels ([2 ** bits], or of each row), scales and codes."""
        rows, inputs = codes.shape
        count = levels.shape[-1]
        table = np.broadcast_to(levels.view(np.uint8), (rows, count))
        packed = pack_units(codes, count.bit_length() - 1)
        return cls(name, np.concatenate([numbers, table, scales, packed], 1), inputs, group)


def pack_units(codes: Bytes, bits: int) -> Bytes:
    """Return codes [out, in] of 2 to 8 bits as planes, uint8 [out, units * 8 * bits]."""
    rows, inputs = codes.shape
    units = -(-inputs // _UNIT)
    split = np.zeros((rows, units * _UNIT), np.uint8)
    split[:, :inputs] = codes
    split = split.reshape(rows, units, 4, 16)
    planes, at = [], 0
    if bits >= 4:
        low = split & np.uint8(15)
        planes.append((low[:, :, 0::2] | low[:, :, 1::2] << np.uint8(4)).reshape(rows, units, 32))
        at = 4
    if bits % 4 >= 2 or bits == 8:
        pairs = split >> np.uint8(at) & np.uint8(3)
        shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
        planes.append(np.bitwise_or.reduce(pairs << shifts, axis=2))
        at += 2
    for place in range(at, bits):
        bit = (split >> np.uint8(place) & np.uint8(1)).reshape(rows, units, _UNIT)
        planes.append(np.packbits(bit, axis=-1, bitorder="little"))
    return np.concatenate(planes, -1).reshape(rows, -1)


def _nested_codes(matrix: NestedCodes) -> Bytes:
    """Return the widest codes, uint8 [out, in]."""
    codes = np.zeros(matrix.shape, np.uint8)
    for plane in matrix.planes:
        bits = np.unpackbits(plane, axis=1, count=matrix.inputs, bitorder="little")
        codes = codes << np.uint8(1) | bits
    return codes


def _ones(codes: Bytes) -> Bytes:
    """Return the half-precision number 1 for each row, in bytes."""
    return np.ones((len(codes), 1), "<f2").view(np.uint8)


def _even(bits: int) -> NDArray[np.int8]:
    """Return what codes of even grids stand for: from half the range below zero upwards."""
    return (np.arange(1 << bits) - (1 << (bits - 1))).astype(np.int8)


def _halves(values: NDArray[np.float32]) -> NDArray[np.float16] | None:
    """Return numbers in half precision; None where it does not hold them exactly."""
    with np.errstate(over="ignore"):
        halves = values.astype("<f2")
    return halves if np.array_equal(halves.astype(np.float32), values) else None
