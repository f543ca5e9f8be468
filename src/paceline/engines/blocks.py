"""Matrices of integers as the native kernels of blocks take them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paceline import _native
from paceline.core import Floats
from paceline.engines.formats import GROUP_FORMATS, SPARSE_FORMATS
from paceline.models.tensors import Grouped, Linear, TwoGrained

ENOUGH = 1.02  # a format this much larger than the smallest is taken if it stands before it
_BITMAP = "bitmap8"  # says with its groups how many weights are not zero
_GAIN = 0.75  # of the bits of faster formats, above which a bitmap is not worth its time
_WIDEST = 16.0  # bits where there is no such format
_STEP_BITS = 6  # of scales in two grains, at most; others become scales of their own


@dataclass(frozen=True, eq=False)
class Blocks:
    """A matrix of integers as the kernels take it: every 32 inputs in a row belong to one group.

    Attributes:
        bits: of a code.
        codes: uint8 [out, in], inputs in the order of `order`.
        scales: float32 [out, groups]; with `steps`, [out, 1].
        zeros: uint16 [out, groups], or None for half the range.
        block_groups: int32 [blocks], the group of each block.
        order: int32 [in], which input comes at each place; None where they are in order.
        steps: uint8 [out, groups], which scales of a row, [out, 1], are multiplied with; or None.
        levels: int8 [2 ** bits], what codes stand for; or None.
    """

    bits: int
    codes: NDArray[np.uint8]
    scales: Floats
    zeros: NDArray[np.uint16] | None
    block_groups: NDArray[np.int32]
    order: NDArray[np.int32] | None = None
    steps: NDArray[np.uint8] | None = None
    levels: NDArray[np.int8] | None = None

    @classmethod
    def of(cls, matrix: Linear) -> Blocks | None:
        """Return a matrix in blocks; None where its groups do not fall so, or it has minima."""
        if isinstance(matrix, TwoGrained):
            return cls._of_two_grained(matrix)
        if not isinstance(matrix, Grouped) or matrix.minima is not None:
            return None
        groups, codes, order = matrix.groups.astype(np.int32), matrix.codes, None
        if matrix.g_idx is not None:
            order = np.argsort(groups, kind="stable").astype(np.int32)
            groups, codes = groups[order], np.ascontiguousarray(codes[:, order])
        starts = _starts(groups)
        if starts is None:
            return None
        return cls(matrix.bits, codes, matrix.scales, matrix.zeros, starts, order)

    @classmethod
    def _of_two_grained(cls, matrix: TwoGrained) -> Blocks | None:
        if matrix.step_bits > _STEP_BITS:
            return None if matrix.grouped is None else cls.of(matrix.grouped)
        starts = _starts((np.arange(matrix.shape[1]) // matrix.group).astype(np.int32))
        if starts is None:
            return None
        return cls(
            matrix.bits,
            matrix.codes,
            np.ascontiguousarray(matrix.units[:, None]),
            None if matrix.zeros is None else matrix.zeros.astype(np.uint16),
            starts,
            steps=matrix.steps,
            levels=matrix.levels,
        )

    @property
    def size(self) -> int:
        """Blocks of a group where all have as many, but for the last one of a row; else 0."""
        size = int(np.count_nonzero(self.block_groups == self.block_groups[:1]))
        even = np.arange(len(self.block_groups)) // max(size, 1)
        return size if np.array_equal(even, self.block_groups) else 0

    def fits(self, name: str) -> bool:
        """Whether a format keeps these integers and scales as they are."""
        if name in GROUP_FORMATS + SPARSE_FORMATS and not self.size:
            return False
        sparse = name in SPARSE_FORMATS
        return _native.format_holds(
            name,
            self.bits,
            self.scales,
            self.zeros,
            self.steps,
            self.levels,
            self.codes if sparse else None,
            self.block_groups if sparse else None,
        )

    def group_in(self, name: str) -> int:
        """Return the `group` that `set_format` takes."""
        if name == _BITMAP:
            parts = (self.bits, self.codes, self.scales, self.zeros, self.block_groups)
            return _native.sparse_group(*parts, self.size)
        return self.size if name in GROUP_FORMATS + SPARSE_FORMATS else 1

    def bits_in(self, name: str) -> float:
        """Bits of a weight in a format that it fits."""
        return _native.format_bits(name, self.codes.shape[1], self.group_in(name))

    def kept_in(self, names: Iterable[str]) -> str | None:
        """Return the format of `names` that keeps this matrix in the fewest bits, or about as many.

        None where no format keeps it. The first one of those that are about as small counts.
        """
        apart = () if self.size else GROUP_FORMATS + SPARSE_FORMATS
        if self.steps is not None:
            apart += SPARSE_FORMATS
        bits = {name: self.bits_in(name) for name in names if name not in apart}
        faster = [bits[name] for name in ("group8", "pairs8") if name in bits and self.fits(name)]
        if _BITMAP in bits and bits[_BITMAP] > _GAIN * min(faster, default=_WIDEST):
            del bits[_BITMAP]
        smallest = next(
            (name for name in sorted(bits, key=lambda n: bits[n]) if self.fits(name)), ""
        )
        enough = ENOUGH * bits.get(smallest, 0)
        return next((name for name in bits if bits[name] <= enough and self.fits(name)), None)


def _starts(groups: NDArray[np.int32]) -> NDArray[np.int32] | None:
    """Return the group of each block [blocks], from that of each input; None where blocks mix."""
    starts = np.ascontiguousarray(groups[:: _native.BLOCK_INPUTS])
    whole = np.repeat(starts, _native.BLOCK_INPUTS)[: len(groups)]
    return starts if np.array_equal(whole, groups) else None
