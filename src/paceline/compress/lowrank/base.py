"""The contract of a factorisation: how a budget is shared, and how factors are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from paceline.compress.base import Statistics, WeightCompressor
from paceline.errors import MethodError
from paceline.registry import check_range

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear

_SEARCHES = 60  # halvings of the price of a number


@dataclass(frozen=True)
class Curve:
    """What a matrix loses at each size that it can have.

    Attributes:
        numbers: float64 [n], that are stored, ascending; the last is the whole matrix.
        losses: float64 [n], shares of the output's energy that are lost.
    """

    numbers: Tensor
    losses: Tensor


@dataclass(frozen=True)
class Factorizer(WeightCompressor):
    """Replaces a matrix by a product of smaller ones.

    Attributes:
        keep: share of the weights' number that the factors of a block have, above 0 and up to 1; a
            matrix that would be kept whole is stored as it is, in `bits`. Default 0.8.
        bits: of the factors' numbers: 8 (groups of 32 with a scale) or 16. Default 16.
    """

    keep: float = 0.8
    bits: int = 16

    def __post_init__(self) -> None:
        check_range(0.001, 1.0, self.name, keep=self.keep)
        check_bits(self.bits, self.name)

    def curve(self, weight: Tensor, stats: Statistics) -> Curve | None:
        """Return what a matrix would lose at each size; None shares the budget evenly."""
        return None

    def for_block(
        self, weights: Mapping[str, Tensor], stats: Mapping[str, Statistics]
    ) -> Mapping[str, WeightCompressor]:
        """Give each matrix a share of the block's numbers; see `share_numbers`."""
        curves = {name: self.curve(weight, stats[name]) for name, weight in weights.items()}
        known = {name: curve for name, curve in curves.items() if curve is not None}
        if len(known) < len(weights):
            return dict.fromkeys(weights, self)
        sizes = {name: weight.numel() for name, weight in weights.items()}
        shares = share_numbers(known, self.keep * sum(sizes.values()))
        return {
            name: replace(self, keep=min(1.0, max(0.001, count / sizes[name])))
            for name, count in shares.items()
        }


def share_numbers(curves: Mapping[str, Curve], budget: float) -> dict[str, float]:
    """Return how many numbers each matrix gets, so that the sum of the losses is small.

    Every matrix takes the size with the smallest loss plus price times numbers; the price is the
    lowest at which all fit into the budget.
    """

    def choose(price: float) -> dict[str, float]:
        chosen = {}
        for name, curve in curves.items():
            at = int((curve.losses + price * curve.numbers).argmin())
            chosen[name] = float(curve.numbers[at])
        return chosen

    low, high = 0.0, 1.0
    for _ in range(_SEARCHES):
        middle = (low + high) / 2
        if sum(choose(middle).values()) > budget:
            low = middle
        else:
            high = middle
    return choose(high)


def low_rank(left: Tensor, right: Tensor, bits: int) -> Linear:
    """Return the stored product of factors [out, rank] and [rank, in]."""
    from paceline.models.tensors import LowRank

    return LowRank(store(left, bits), store(right, bits))


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


def store(matrix: Tensor, bits: int) -> Linear:
    """Return a factor, or a whole matrix, in integers of 8 bits or in half precision.

    Raises:
        MethodError: a number is too large for half precision.
    """
    import numpy as np

    from paceline.compress.quantize.rtn import RoundToNearest
    from paceline.models.tensors import Dense

    if bits == 8:
        return RoundToNearest(bits=8, group=32, search=0).compress(matrix, Statistics())
    with np.errstate(over="ignore"):
        values = matrix.numpy().astype(np.float16)
    if not np.isfinite(values).all():
        raise MethodError("a factor is too large for half precision; take bits=8")
    return Dense(np.ascontiguousarray(values), "F16")
