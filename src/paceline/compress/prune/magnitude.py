"""Magnitude pruning: the smallest weights go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.compress.base import Statistics
from paceline.compress.prune.base import Pruner
from paceline.core import Exactness
from paceline.registry import Source, pruners

if TYPE_CHECKING:
    from torch import Tensor


@pruners.register("magnitude", Exactness.LOSSY)
@dataclass(frozen=True)
class Magnitude(Pruner):
    """Remove the weights with the smallest absolute values, row by row. Needs no data.

    Attributes:
        sparsity: as of every pruner.
        pattern: as of every pruner.
    """

    source = Source(
        authors="Han et al.",
        title="Learning both Weights and Connections for Efficient Neural Networks",
        arxiv="1506.02626",
        section="section 3",
        note="without retraining; by row, not over the whole matrix",
    )
    catalogue = (336,)  # `--target-loss` tries the shares of zeros, the largest first
    missing = {336: "one threshold for the whole model"}
    examples = ("magnitude", "magnitude:sparsity=0.3", "magnitude:pattern=2:4")

    def score(self, weight: Tensor, stats: Statistics) -> Tensor:
        """Return the absolute values."""
        return weight.abs()
