"""FFSplit: channels of the MLP with large outputs keep more of their weights than the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from paceline.compress.base import Statistic, Statistics, WeightCompressor
from paceline.compress.prune.base import Pruner
from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.registry import Source, check_range, pruners

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear


@pruners.register("ffsplit", Exactness.LOSSY)
@dataclass(frozen=True)
class FFSplit(Pruner):
    """Split the channels of each MLP by their outputs, and prune the two parts unevenly.

    Heavy hitters are the channels whose output, the input of `down` times its column there, has the
    largest norm on the calibration texts. Their weights are pruned to a share of their own, those
    of the other channels so much that the share of all is `sparsity`; within a part, and in
    attention, scores are those of Wanda, row by row.

    Attributes:
        sparsity: share of the weights of every row that is removed, 0 to 1. Default 0.5.
        pattern: unstructured alone. Default unstructured.
        heavy: share of the channels that are heavy hitters, 0 to 1. Default 0.2.
        heavy_sparsity: share of their weights that is removed, 0 to 1, and at most `sparsity`.
            Default 0.4.
    """

    heavy: float = 0.2
    heavy_sparsity: float = 0.4

    source = Source(
        authors="Liu et al.",
        title="FFSplit: Split Feed-Forward Network For Optimizing Accuracy-Efficiency Trade-off in "
        "Language Model Inference",
        arxiv="2401.04044",
        section="section 3",
        note="the compression that is divided unevenly is pruning with Wanda's score",
    )
    catalogue = (244,)
    examples = ("ffsplit", "ffsplit:sparsity=0.4,heavy=0.1,heavy_sparsity=0")
    statistics = frozenset({Statistic.INPUT_NORM})

    def __post_init__(self) -> None:
        Pruner.__post_init__(self)
        check_range(0.0, 1.0, self.name, heavy=self.heavy, heavy_sparsity=self.heavy_sparsity)
        if self.has_pattern:
            raise MethodError(
                f"{self.name}:pattern={self.pattern} removes as much of every channel, and "
                f"{self.name} differs between them; take unstructured, or dass"
            )
        if self._rest > 1:
            raise MethodError(
                f"{self.name}:heavy_sparsity is {self.heavy_sparsity}: the other channels cannot "
                f"lose so much that {self.sparsity} of all weights go; raise it, or lower heavy"
            )

    @property
    def _rest(self) -> float:
        """Share of the weights of the other channels that is removed."""
        left = self.sparsity - self.heavy * self._of_heavy
        return left / max(1 - self.heavy, 1e-9)

    @property
    def _of_heavy(self) -> float:
        """Share of the weights of heavy hitters that is removed, at most that of all."""
        return min(self.heavy_sparsity, self.sparsity)

    def for_block(
        self, weights: Mapping[str, Tensor], stats: Mapping[str, Statistics]
    ) -> Mapping[str, WeightCompressor]:
        """Return the pruner of each matrix; those of the MLP know the heavy hitters."""
        chosen: dict[str, WeightCompressor] = dict.fromkeys(weights, self)
        if "down" in weights and (norms := stats["down"].input_norm) is not None:
            outputs = norms * weights["down"].norm(dim=0)
            heavy = outputs.argsort(descending=True, stable=True)[: round(self.heavy * len(norms))]
            split = _Split(self.sparsity, self.pattern, self.heavy, self.heavy_sparsity, heavy)
            for name in ("gate", "up", "down"):
                if name in weights:
                    chosen[name] = replace(split, of_inputs=name == "down")
        return chosen

    def score(self, weight: Tensor, stats: Statistics) -> Tensor:
        """Return |w| times the Euclidean norm of the weight's input channel."""
        assert stats.input_norm is not None
        return weight.abs() * stats.input_norm


@dataclass(frozen=True)
class _Split(FFSplit):
    """The pruner of the matrices of an MLP.

    Attributes:
        channels: int64, the heavy hitters.
        of_inputs: whether channels are inputs of the matrix, not outputs.
    """

    channels: Tensor | None = field(default=None, compare=False)
    of_inputs: bool = False

    def compress(self, weight: Tensor, stats: Statistics) -> Linear:
        """Keep the best weights of each part, unchanged."""
        import torch

        assert self.channels is not None
        scores = self.score(weight, stats)
        kept = torch.empty_like(weight, dtype=torch.bool)
        heavy = torch.zeros(weight.shape[1 if self.of_inputs else 0], dtype=torch.bool)
        heavy[self.channels] = True
        for part, share in ((heavy, self._of_heavy), (~heavy, self._rest)):
            places = (slice(None), part) if self.of_inputs else (part,)
            own = scores[places]
            if own.numel():
                rule = FFSplit(share, heavy=0.0)
                kept[places] = rule.select(own)
        return self.store(weight, kept)
