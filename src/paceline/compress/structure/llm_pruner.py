"""LLM-Pruner: remove coupled structures by a Taylor expansion of the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.compress.structure.widths.gradients import text_gradients
from paceline.compress.structure.widths.pruner import (
    Counts,
    LayerScores,
    WidthPruner,
    coupled_sums,
    even_counts,
)
from paceline.compress.whole_model import WholeModel
from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.registry import Source, check_range, structures

if TYPE_CHECKING:
    from torch import Tensor

ORDERS = ("first", "second", "mixed")


@structures.register("llm_pruner", Exactness.LOSSY)
@dataclass(frozen=True)
class LLMPruner(WidthPruner):
    """Remove the MLP channels and groups of heads whose weights change the loss least.

    The importance of a weight is what its removal changes of the texts' loss by a Taylor expansion
    of the first or the second order, with squared gradients in place of second derivatives; that of
    a structure is the sum over its weights in all matrices. Every layer but the first and last ones
    loses the same share of its channels and of its heads.

    Attributes:
        share: of the weights of the layers that is removed, 0.01 to 0.9. Default 0.2.
        multiple: widths of MLPs are rounded to multiples of it, 1 to 1024. Default 32.
        order: of the expansion: first, second or mixed. Default first.
        edges: first layers that stay whole, and half as many last ones, as a share of all layers,
            0 to 0.4. Default 0.1.
        rows: texts that gradients are computed on, 1 to 1000. Default 8.
    """

    order: str = "first"
    edges: float = 0.1
    rows: int = 8

    source = Source(
        authors="Ma et al.",
        title="LLM-Pruner: On the Structural Pruning of Large Language Models",
        arxiv="2305.11627",
        section="sections 3.1 and 3.2",
        note="recovery is `+recover`, which distils instead of tuning on instructions",
    )
    catalogue = (144,)
    examples = ("llm_pruner:multiple=4,rows=2", "llm_pruner:multiple=4,order=mixed,edges=0")

    def __post_init__(self) -> None:
        WidthPruner.__post_init__(self)
        check_range(0.0, 0.4, self.name, edges=self.edges)
        check_range(1, 1000, self.name, rows=self.rows)
        if self.order not in ORDERS:
            raise MethodError(f"{self.name}:order is {self.order!r}, expected {', '.join(ORDERS)}")

    def scores(self, model: WholeModel, base: WholeModel, folder: Path) -> list[LayerScores]:
        """Return the summed importance of each unit."""
        shapes = model.config.layers
        scores = [LayerScores({}) for _ in shapes]
        sums: dict[str, Tensor] = {}
        squares: dict[str, Tensor] = {}
        rows = min(self.rows, len(model.texts))
        for step, (index, gradients) in enumerate(text_gradients(model, rows), 1):
            for name, each in gradients.items():
                sums[name] = sums.get(name, 0) + each / rows
                squares[name] = squares.get(name, 0) + each.square() / rows
            if step % rows == 0:
                weights = model.layer(index)
                importance = {
                    name: self._importance(weights[name], sums[name], squares[name])
                    for name in sums
                }
                scores[index] = LayerScores(coupled_sums(importance, shapes[index]))
                sums, squares = {}, {}
        return scores

    def _importance(self, weight: Tensor, gradient: Tensor, squared: Tensor) -> Tensor:
        """Return by how much the loss changes without each weight, [out, in]."""
        first, second = weight * gradient, weight.square() * squared / 2
        if self.order == "first":
            return first.abs()
        return second if self.order == "second" else (first - second).abs()

    def counts(
        self, scores: Sequence[LayerScores], sizes: Sequence[Mapping[str, int]], removed: float
    ) -> Counts:
        """Return the same share for every layer between the edges."""
        count = len(scores)
        first, last = int(self.edges * count), count - int(self.edges * count / 2)
        inner = range(first, last)
        weights = sum(
            size[name] * len(own)
            for index in inner
            for size, layer in [(sizes[index], scores[index])]
            for name, own in layer.units.items()
        )
        share = min(removed / max(weights, 1), 1.0)
        return even_counts(scores, [share if index in inner else 0.0 for index in range(count)])
