"""Low-rank corrections that the native engine multiplies in their own bits beside a matrix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline import _native
from paceline.core import Floats
from paceline.engines.blocks import Blocks
from paceline.engines.formats import BITS, ROW_FORMATS
from paceline.models.tensors import Linear, LowRank, Sum

_ENOUGH = 0.8  # of the bits of the whole in half precision, below which it is not expanded
_HALF_BITS = 16


@dataclass(frozen=True, eq=False)
class LowRankTerm:
    """Two thin matrices of integers, the product of which is added to a matrix.

    Attributes:
        right: [rank, in], and its format.
        left: [out, rank], and its format.
    """

    right: tuple[str, Blocks]
    left: tuple[str, Blocks]

    @property
    def bits(self) -> float:
        """Bits of both factors."""
        return sum(
            block.codes.size * block.bits_in(form) for form, block in (self.right, self.left)
        )

    def add_to(self, model: _native.NativeModel, name: str) -> None:
        """Tell a model of the term, before any of the weights beside it is stored."""
        groups = [(form, block.group_in(form)) for form, block in (self.right, self.left)]
        model.add_low_rank(name, len(self.right[1].codes), *groups[0], *groups[1])


def split_term(matrix: Linear) -> tuple[Linear, LowRankTerm] | None:
    """Return a matrix and the low-rank term that is added to it; None where it has none.

    None, too, where the factors are no integers that the kernels keep.
    """
    if not isinstance(matrix, Sum) or len(matrix.parts) != 2:
        return None
    base, product = matrix.parts
    if not isinstance(product, LowRank):
        return None
    term = term_of(product)
    return None if term is None else (base, term)


def term_of(product: LowRank) -> LowRankTerm | None:
    """Return a product of low rank as it is multiplied; None where it is not kept in integers."""
    factors = [_kept(product.right), _kept(product.left)]
    if factors[0] is None or factors[1] is None:
        return None
    return LowRankTerm(factors[0], factors[1])


def pays(base_bits: float, term: LowRankTerm, shape: tuple[int, int]) -> bool:
    """Return whether a matrix of `base_bits` a weight and its term are small against 16 bits."""
    size = shape[0] * shape[1]
    return base_bits * size + term.bits <= _ENOUGH * _HALF_BITS * size


def whole(base: Floats, right: Floats, left: Floats) -> Floats:
    """Return a matrix with its low-rank term, float32 [out, in]."""
    return np.asarray(base + left @ right, np.float32)


def _kept(factor: Linear) -> tuple[str, Blocks] | None:
    block = Blocks.of(factor)
    names = [name for name in BITS if name not in ROW_FORMATS]
    form = block.kept_in(names) if block is not None and block.order is None else None
    return None if form is None or block is None else (form, block)
