"""Wanda: weights and activations; the smallest products of the two go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.compress.base import Statistic, Statistics
from paceline.compress.prune.base import Pruner
from paceline.core import Exactness
from paceline.registry import Source, pruners

if TYPE_CHECKING:
    from torch import Tensor


@pruners.register("wanda", Exactness.LOSSY)
@dataclass(frozen=True)
class Wanda(Pruner):
    """Remove the weights with the smallest |w| times the norm of their input, row by row.

    The weights that stay are not changed.

    Attributes:
        sparsity: as of every pruner.
        pattern: as of every pruner.
    """

    source = Source(
        authors="Sun et al.",
        title="A Simple and Effective Pruning Approach for Large Language Models",
        arxiv="2306.11695",
        section="section 3, equation 1",
    )
    catalogue = (206,)
    examples = ("wanda", "wanda:sparsity=0.3", "wanda:pattern=2:4")
    statistics = frozenset({Statistic.INPUT_NORM})

    def score(self, weight: Tensor, stats: Statistics) -> Tensor:
        """Return |w| times the Euclidean norm of the weight's input channel."""
        assert stats.input_norm is not None
        return weight.abs() * stats.input_norm
