"""Pruner-Zero: the score that a search over formulas of weights and gradients found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.compress.base import Statistic, Statistics
from paceline.compress.prune.base import Pruner
from paceline.core import Exactness
from paceline.registry import Source, pruners

if TYPE_CHECKING:
    from torch import Tensor


@pruners.register("pruner_zero", Exactness.LOSSY)
@dataclass(frozen=True)
class PrunerZero(Pruner):
    """Remove the weights with the smallest w^2 times scaled gradient, row by row.

    Gradients are of the loss of the calibration texts; their sizes are scaled to 0 to 1 over the
    matrix, so that the weight with the smallest gradient counts nothing.

    Attributes:
        sparsity: as of every pruner.
        pattern: as of every pruner.
    """

    source = Source(
        authors="Dong et al.",
        title="Pruner-Zero: Evolving Symbolic Pruning Metric from scratch for Large Language "
        "Models",
        arxiv="2406.02924",
        section="section 4, the formula of the LLaMA models",
        note="the size of a gradient is the root of the sum of squares over positions, not over "
        "texts",
    )
    catalogue = (234,)
    missing = {234: "the search for formulas; the one that the paper found is here"}
    examples = ("pruner_zero", "pruner_zero:pattern=4:8")
    statistics = frozenset({Statistic.FISHER})

    def score(self, weight: Tensor, stats: Statistics) -> Tensor:
        """Return w^2 times the size of the gradient, scaled to 0 to 1."""
        assert stats.fisher is not None
        size = stats.fisher.sqrt()
        low, high = size.min(), size.max()
        return weight.square() * (size - low) / (high - low).clamp(min=1e-30)
