"""SparseGPT: columns one after another; those still to come make up for what is removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.compress.base import Statistic, Statistics
from paceline.compress.column_errors import TOGETHER, inverse_factor, keep_last, replace_columns
from paceline.compress.prune.base import Pruner
from paceline.core import Exactness
from paceline.registry import Source, check_range, pruners

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear


@pruners.register("sparsegpt", Exactness.LOSSY)
@dataclass(frozen=True)
class SparseGPT(Pruner):
    """Remove the weights whose loss later columns make up for best, and change these so.

    Minimises the squared error of the outputs on the calibration texts, column by column. Which
    weights go is decided for 128 columns at a time over all rows, or for each group of a pattern
    when its first column is reached, from the weights as they are then.

    Attributes:
        sparsity: share of the weights that is removed of every 128 columns, 0 to 1; rows differ.
            As of every pruner with a pattern. Default 0.5.
        pattern: as of every pruner.
        damping: share of the mean diagonal of the second moment that is added to it, 0 to 1.
            Default 0.01.
    """

    damping: float = 0.01

    source = Source(
        authors="Frantar and Alistarh",
        title="SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
        arxiv="2301.00774",
        section="section 3, algorithm 1",
    )
    examples = ("sparsegpt", "sparsegpt:sparsity=0.3,damping=0.1", "sparsegpt:pattern=2:4")
    statistics = frozenset({Statistic.SECOND_MOMENT})

    def __post_init__(self) -> None:
        Pruner.__post_init__(self)
        check_range(0.0, 1.0, self.name, damping=self.damping)

    def score(self, weight: Tensor, stats: Statistics) -> Tensor:
        """Return by how much the squared error grows when each weight alone is removed."""
        assert stats.second_moment is not None
        diagonal = _factor(stats.second_moment, self.damping, self.name).diagonal()
        return (weight / diagonal).square()

    def compress(self, weight: Tensor, stats: Statistics) -> Linear:
        """Return the weights that stay, changed so that they make up for the others."""
        import torch

        assert stats.second_moment is not None
        factor = _factor(stats.second_moment, self.damping, self.name)
        kept = torch.empty_like(weight, dtype=torch.bool)
        width = self.group_width(weight.shape[1]) if self.has_pattern else TOGETHER

        def prune_column(at: int, rest: Tensor) -> Tensor:
            if at % width == 0:
                columns = slice(at, at + width)
                scores = (rest[:, columns] / factor.diagonal()[columns]).square()
                kept[:, columns] = self._select_columns(scores)
            return rest[:, at : at + 1].where(kept[:, at : at + 1], 0.0)

        return self.store(replace_columns(weight, factor, prune_column), kept)

    def _select_columns(self, scores: Tensor) -> Tensor:
        """Return which weights of neighbouring columns stay, bool [out, columns]."""
        if self.has_pattern:
            return self.select(scores)
        return self.select(scores.reshape(1, -1)).reshape(scores.shape)


@keep_last
def _factor(moment: Tensor, damping: float, name: str) -> Tensor:
    return inverse_factor(moment, damping, name)
