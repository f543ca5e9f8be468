"""DaSS: what goes into a gated MLP is scored by what comes out of its gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from paceline.compress.base import Statistic, Statistics, WeightCompressor
from paceline.compress.prune.base import Pruner
from paceline.core import Exactness
from paceline.registry import Source, check_range, pruners

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear

_INTO_MLP = ("gate", "up")


@pruners.register("dass", Exactness.LOSSY)
@dataclass(frozen=True)
class DaSS(Pruner):
    """Remove weights of an MLP by what its hidden units put out, those of attention as Wanda.

    A weight of `gate` or `up` is worth |w| times the norm of its unit's output to the power of
    `alpha`; the weights of one input compete, so that units with small outputs keep fewer. The
    weights of `down` and of attention are worth |w| times the norm of their input, and those of one
    row compete.

    Attributes:
        sparsity: share of the weights that is removed of every row, or of every column of `gate`
            and `up`, 0 to 1; as of every pruner with a pattern. Default 0.5.
        pattern: as of every pruner; of `gate` and `up` N of every M neighbouring outputs stay.
            Default unstructured.
        alpha: power of the norm of a unit's output, 0 to 4. Default 0.5.
    """

    alpha: float = 0.5

    source = Source(
        authors="Guo et al.",
        title="Dependency-Aware Semi-Structured Sparsity of GLU Variants in Large Language Models",
        arxiv="2405.01943",
        section="section 3",
        note="the paper leaves the matrices of attention alone; Wanda's score is taken for them",
    )
    catalogue = (264,)
    examples = ("dass", "dass:pattern=2:4,alpha=1")
    statistics = frozenset({Statistic.INPUT_NORM})

    def __post_init__(self) -> None:
        Pruner.__post_init__(self)
        check_range(0.0, 4.0, self.name, alpha=self.alpha)

    def for_block(
        self, weights: Mapping[str, Tensor], stats: Mapping[str, Statistics]
    ) -> Mapping[str, WeightCompressor]:
        """Return the pruner of each matrix; those of `gate` and `up` know the units' outputs."""
        chosen: dict[str, WeightCompressor] = dict.fromkeys(weights, self)
        if "down" in stats and "gate" in stats:
            norms = stats["down"].input_norm
            settings = {"sparsity": self.sparsity, "pattern": self.pattern, "alpha": self.alpha}
            for name in _INTO_MLP:
                if name in weights:
                    chosen[name] = _IntoMLP(**settings, unit_norm=norms)  # type: ignore[arg-type]
        return chosen

    def score(self, weight: Tensor, stats: Statistics) -> Tensor:
        """Return |w| times the Euclidean norm of the weight's input channel."""
        assert stats.input_norm is not None
        return weight.abs() * stats.input_norm


@dataclass(frozen=True)
class _IntoMLP(DaSS):
    """The pruner of `gate` and `up`.

    Attributes:
        unit_norm: float32 [out], the norm of what each hidden unit puts out.
    """

    unit_norm: Tensor | None = field(default=None, compare=False)

    def score(self, weight: Tensor, stats: Statistics) -> Tensor:
        """Return |w| times the norm of the unit's output to the power of `alpha`."""
        assert self.unit_norm is not None
        return weight.abs() * self.unit_norm[:, None] ** self.alpha

    def compress(self, weight: Tensor, stats: Statistics) -> Linear:
        """Keep the best weights of each column, unchanged."""
        kept = self.select(self.score(weight, stats).T).T.contiguous()
        return replace(self, pattern="unstructured").store(weight, kept)
