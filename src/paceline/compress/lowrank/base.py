"""The contract of a factorisation: how many ranks fit, and how factors are stored."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.compress.base import Statistics, WeightCompressor
from paceline.errors import MethodError
from paceline.registry import check_range

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear


@dataclass(frozen=True)
class Factorizer(WeightCompressor):
    """Replaces a matrix by a product of two thin ones.

    Attributes:
        keep: share of the weights' number that the factors have, above 0 and below 1. Default 0.8.
        bits: of the factors' numbers: 8 (groups of 32 with a scale) or 16. Default 16.
    """

    keep: float = 0.8
    bits: int = 16

    def __post_init__(self) -> None:
        check_range(0.001, 0.999, self.name, keep=self.keep)
        check_bits(self.bits, self.name)

    @abstractmethod
    def factor(self, weight: Tensor, stats: Statistics, rank: int) -> tuple[Tensor, Tensor]:
        """Return factors [out, rank] and [rank, in] of a matrix [out, in]."""

    def compress(self, weight: Tensor, stats: Statistics) -> Linear:
        """See `WeightCompressor`."""
        rows, columns = weight.shape
        rank = max(1, int(self.keep * rows * columns / (rows + columns)))
        return low_rank(*self.factor(weight, stats, rank), self.bits)


def low_rank(left: Tensor, right: Tensor, bits: int) -> Linear:
    """Return the stored product of factors [out, rank] and [rank, in]."""
    from paceline.models.tensors import LowRank

    return LowRank(_stored(left, bits), _stored(right, bits))


def whitened_factors(matrix: Tensor, stats: Statistics, rank: int) -> tuple[Tensor, Tensor]:
    """Return the product of a rank that is closest to a matrix [out, in] on the inputs.

    Singular values of the matrix times the whitener are cut; each factor has their roots.
    """
    import torch

    root, inverse = stats.whitener
    left, values, right = torch.linalg.svd(matrix @ root, full_matrices=False)
    shares = values[:rank].sqrt()
    return left[:, :rank] * shares, (shares[:, None] * right[:rank]) @ inverse


def check_bits(bits: int, name: str) -> None:
    """Refuse widths of factors that are not stored.

    Raises:
        MethodError: names the setting.
    """
    if bits not in (8, 16):
        raise MethodError(f"{name}:bits is {bits}, expected 8 or 16")


def _stored(factor: Tensor, bits: int) -> Linear:
    import numpy as np

    from paceline.compress.quantize.rtn import RoundToNearest
    from paceline.models.tensors import Dense

    if bits == 8:
        return RoundToNearest(bits=8, group=32, search=0).compress(factor, Statistics())
    with np.errstate(over="ignore"):
        values = factor.numpy().astype(np.float16)
    if not np.isfinite(values).all():
        raise MethodError("a factor is too large for half precision; take bits=8")
    return Dense(np.ascontiguousarray(values), "F16")
