"""EoRA: a low-rank side path that makes up for most of what compression lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.compress.base import Correction, Statistic, Statistics
from paceline.compress.lowrank.base import check_bits, low_rank, whitened_factors
from paceline.core import Exactness
from paceline.registry import Source, check_range, corrections

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear


@corrections.register("eora", Exactness.LOSSY)
@dataclass(frozen=True)
class EoRA(Correction):
    """Add the product of two thin matrices that is closest to the error in the inputs' eigenspace.

    Attributes:
        rank: of the product, 1 to 4096; at most that of the matrix is taken. Default 32.
        bits: of the factors' numbers: 8 (groups of 32 with a scale) or 16. Default 8.
    """

    rank: int = 32
    bits: int = 8

    source = Source(
        authors="Liu et al.",
        title="EoRA: Training-free Compensation for Compressed LLM with Eigenspace Low-Rank "
        "Approximation",
        arxiv="2410.21271",
        section="section 3, algorithm 1",
    )
    catalogue = (407,)
    examples = ("eora", "eora:rank=8,bits=16")
    statistics = frozenset({Statistic.SECOND_MOMENT})

    def __post_init__(self) -> None:
        check_range(1, 4096, self.name, rank=self.rank)
        check_bits(self.bits, self.name)

    def correct(self, weight: Tensor, stored: Linear, stats: Statistics) -> Linear:
        """Return the stored form and the product, summed."""
        import torch

        from paceline.models.tensors import Sum

        error = weight - torch.from_numpy(stored.dense())
        factors = whitened_factors(error, stats, self.rank)
        return Sum((stored, low_rank(*factors, self.bits)))
