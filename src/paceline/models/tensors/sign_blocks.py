"""Matrices as sums of sign matrices with low-rank magnitudes, of which the last may be left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.errors import ModelError
from paceline.models.formats.bits import packed_size
from paceline.models.tensors.base import Arrays, Index, Nested, multiply

Halves = NDArray[np.float16]


@dataclass(frozen=True, slots=True, eq=False)
class SignBlocks(Nested):
    """A sum of blocks, each of them signs times a product of two thin matrices, entry by entry.

    Each block holds what the blocks before it miss, so that the first ones are a coarser version of
    the matrix.

    Based on "BitStack: Fine-Grained Size Control for Compressed Large Language Models in Variable
    Memory Environments".

    Attributes:
        signs: uint8 [blocks, out, ceil(in / 8)], a bit for each entry, lowest first; 1 is +1.
        left: float16 [blocks, out, rank].
        right: float16 [blocks, rank, in].
        losses: float32 [blocks], the share of the output's energy that is missed with this block
            and those before it.
    """

    signs: NDArray[np.uint8]
    left: Halves
    right: Halves
    losses: Floats

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        left, right = self.left, self.right
        if any(part.dtype != np.float16 or part.ndim != 3 for part in (left, right)):
            raise ModelError(
                f"factors are {left.dtype} {list(left.shape)} and {right.dtype} "
                f"{list(right.shape)}, expected float16 [blocks, out, rank] and [blocks, rank, in]"
            )
        count, rank = len(left), left.shape[2]
        if not count or right.shape[:2] != (count, rank):
            raise ModelError(
                f"factors are {list(left.shape)} and {list(right.shape)}, expected as many blocks "
                "and ranks in both, at least one block"
            )
        packed = (count, left.shape[1], packed_size(right.shape[2], 1))
        if self.signs.dtype != np.uint8 or self.signs.shape != packed:
            raise ModelError(
                f"signs are {self.signs.dtype} {list(self.signs.shape)}, expected uint8 "
                f"{list(packed)}"
            )
        if not all(np.isfinite(part).all() for part in (left, right)):
            raise ModelError("factors hold NaN or infinite values")
        self._check_losses(count)

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.left.shape[1], self.right.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of signs, factors and losses."""
        return self.signs.nbytes + self.left.nbytes + self.right.nbytes + self.losses.nbytes

    def dense(self) -> Floats:
        """Return the sum of the blocks, in order, each the product of `LowRank` with its signs."""
        values = np.zeros(self.shape, np.float32)
        for signs, left, right in zip(self.signs, self.left, self.right, strict=True):
            sizes = multiply(left.astype(np.float32), right.astype(np.float32))
            plus = np.unpackbits(signs, axis=1, count=self.shape[1], bitorder="little")
            values += np.where(plus, sizes, -sizes)
        return values

    def first(self, count: int) -> SignBlocks:
        """Return the sum of the first blocks."""
        kept = slice(count)
        return SignBlocks(self.signs[kept], self.left[kept], self.right[kept], self.losses[kept])

    def rows(self, index: Index) -> SignBlocks:
        """Return some rows."""
        return SignBlocks(self.signs[:, index], self.left[:, index], self.right, self.losses)

    def _meta(self) -> dict[str, Any]:
        return {}

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {
            "signs": self.signs,
            "left": self.left,
            "right": self.right,
            "losses": self.losses,
        }

    @classmethod
    def _build(cls, meta: Mapping[str, Any], arrays: Arrays) -> SignBlocks:
        return cls(*(arrays[name] for name in ("signs", "left", "right", "losses")))
