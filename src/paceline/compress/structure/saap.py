"""SAAP: two importances of a structure, each weighed by how much it varies between texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.compress.structure.widths.gradients import text_gradients
from paceline.compress.structure.widths.pruner import (
    LayerScores,
    WidthPruner,
    coupled_sums,
    unit_size,
)
from paceline.compress.whole_model import WholeModel
from paceline.core import Exactness
from paceline.registry import Source, check_range, structures

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.config import LayerConfig


@structures.register("saap", Exactness.LOSSY)
@dataclass(frozen=True)
class SAAP(WidthPruner):
    """Remove the MLP channels and groups of heads with the smallest fused importance.

    A structure has two importances, both of the first order in the gradients of the texts' loss:
    the absolute sum over its weights, and the sum of absolute values. Each is divided by twice its
    variance over the texts, its homoscedastic uncertainty, before they are added; what varies is
    trusted less. The smallest of the whole model go.

    Attributes:
        share: of the weights of the layers that is removed, 0.01 to 0.9. Default 0.2.
        multiple: widths of MLPs are rounded to multiples of it, 1 to 1024. Default 32.
        rows: texts that gradients are computed on, 2 to 1000. Default 8.
    """

    rows: int = 8

    source = Source(
        authors="Zheng et al.",
        title="Adaptive Pruning for Large Language Models with Structural Importance Awareness",
        section="abstract: fusion by homoscedastic uncertainty, ranking of all modules",
        note="written from the abstract; the paper's formula may differ",
    )
    catalogue = (268,)
    missing = {268: "fine-tuning in groups; `+recover` trains all layers alike"}
    examples = ("saap:multiple=4,rows=2", "saap:share=0.3,multiple=8,rows=3")

    def __post_init__(self) -> None:
        WidthPruner.__post_init__(self)
        check_range(2, 1000, self.name, rows=self.rows)

    def scores(self, model: WholeModel, base: WholeModel, folder: Path) -> list[LayerScores]:
        """Return the fused importance of each unit."""
        shapes = model.config.layers
        seen: list[dict[str, list[Tensor]]] = [{} for _ in shapes]
        rows = min(self.rows, len(model.texts))
        for index, gradients in text_gradients(model, rows):
            weights = model.layer(index)
            products = {name: weights[name] * each for name, each in gradients.items()}
            for name, each in _importances(products, shapes[index]).items():
                seen[index].setdefault(name, []).append(each)
        return [LayerScores({name: _fused(each) for name, each in own.items()}) for own in seen]


def _importances(products: dict[str, Tensor], shape: LayerConfig) -> dict[str, Tensor]:
    """Return both importances of each unit on one text, for one of its weights, [2, units]."""
    import torch

    whole = coupled_sums(products, shape)
    single = coupled_sums({name: each.abs() for name, each in products.items()}, shape)
    return {
        name: torch.stack([whole[name].abs(), single[name]]) / unit_size(products, shape, name)
        for name in whole
    }


def _fused(texts: list[Tensor]) -> Tensor:
    """Return the sum of two importances over their uncertainties, [units].

    Args:
        texts: of each text, [2, units]; scaled to a mean of one, so that variances compare.
    """
    import torch

    values = torch.stack(texts)  # [texts, 2, units]
    values = values / values.mean((0, 2), keepdim=True).clamp(min=1e-30)
    mean = values.mean(0)
    uncertainty = values.var(0, correction=0).mean(1, keepdim=True) + 1e-6  # [2, 1]
    shares = (1 / (2 * uncertainty)) / (1 / (2 * uncertainty)).sum()
    fused: Tensor = (shares * mean).sum(0)
    return fused
