"""Singular values after whitening: the product that loses least on the calibration texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.compress.base import Statistic, Statistics
from paceline.compress.lowrank.base import Factorizer, whitened_factors
from paceline.core import Exactness
from paceline.registry import Source, factorizers

if TYPE_CHECKING:
    from torch import Tensor


@factorizers.register("svd", Exactness.LOSSY)
@dataclass(frozen=True)
class WhitenedSVD(Factorizer):
    """Cut the singular values of the matrix times the root of its inputs' second moment.

    The result has the smallest squared error of the outputs of all products of its rank.

    Attributes:
        keep: as of every factorizer.
        bits: as of every factorizer.
    """

    source = Source(
        authors="Wang et al.",
        title="SVD-LLM: Truncation-aware Singular Value Decomposition for LLM Compression",
        arxiv="2403.07378",
        section="section 3.1",
        note="the root by eigenvectors; without the update of the left factor",
    )
    examples = ("svd:keep=0.9", "svd:keep=0.9,bits=8")
    statistics = frozenset({Statistic.SECOND_MOMENT})

    def factor(self, weight: Tensor, stats: Statistics, rank: int) -> tuple[Tensor, Tensor]:
        """Return the factors, the root of each singular value in both."""
        return whitened_factors(weight, stats, rank)
