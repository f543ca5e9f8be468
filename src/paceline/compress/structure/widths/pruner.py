"""Score MLP channels and groups of heads, and cut the lowest of the whole model out of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.compress.structure.base import KeptLayer, Structure, StructureMethod
from paceline.compress.structure.widths.slicing import (
    READERS,
    check_sliceable,
    group_columns,
    keep_channels,
    keep_groups,
)
from paceline.compress.whole_model import WholeModel
from paceline.registry import check_range

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.config import LayerConfig

Counts = list[dict[str, int]]  # units of each part of each layer


@dataclass(frozen=True)
class LayerScores:
    """Scores of the units of one layer.

    Attributes:
        units: float64 [units] for `o` (groups of heads) and `down` (MLP channels), those whose
            inputs are removed; higher stays.
        means: float64 [in] of the inputs of the same matrices, where the method uses them.
    """

    units: dict[str, Tensor]
    means: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class WidthPruner(StructureMethod):
    """Removes the MLP channels and groups of heads with the smallest scores.

    Attributes:
        share: of the weights of the layers that is removed, 0.01 to 0.9. Default 0.2.
        multiple: widths of MLPs are rounded to multiples of it, 1 to 1024. Default 32.
    """

    share: float = 0.2
    multiple: int = 32

    def __post_init__(self) -> None:
        check_range(0.01, 0.9, self.name, share=self.share)
        check_range(1, 1024, self.name, multiple=self.multiple)

    @abstractmethod
    def scores(self, model: WholeModel, base: WholeModel, folder: Path) -> list[LayerScores]:
        """Return the scores of each layer; arguments are those of `restructure`."""

    def counts(
        self, scores: Sequence[LayerScores], sizes: Sequence[Mapping[str, int]], removed: float
    ) -> Counts:
        """Return how many units of each part stay; by default the highest of the whole model.

        Args:
            scores: of each layer.
            sizes: weights of a unit of each part of each layer.
            removed: weights that go.
        """
        bound = _bound(scores, sizes, removed)
        return [
            {name: int((own > bound).sum()) for name, own in layer.units.items()}
            for layer in scores
        ]

    def repair(
        self, weights: Mapping[str, Tensor], name: str, gone: Tensor, means: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return tensors that make up for the inputs of a matrix that go; none by default.

        Args:
            weights: of the layer, before anything was cut.
            name: of the matrix.
            gone: bool [in].
            means: see `LayerScores`.
        """
        return {}

    def restructure(self, model: WholeModel, base: WholeModel, folder: Path) -> Structure:
        """See `StructureMethod`."""
        return self.cut(model, base, folder)

    def after_dropping(
        self, count: int, model: WholeModel, base: WholeModel, folder: Path
    ) -> Structure:
        """Return a model without `count` layers, and what is left of the share cut from the rest.

        Layers go whose outputs are most similar to their inputs.
        """
        from paceline.compress.structure.layer_drop import LayerDrop

        if not count:
            return self.cut(model, base, folder)
        dropped = LayerDrop(count=count, by="cosine").restructure(model, base, folder)
        sources = [layer.source for layer in dropped.layers]
        left = model.with_layers(
            (layer.shape, model.layer(layer.source)) for layer in dropped.layers
        )
        share = 1 - (1 - self.share) * model.matrix_weights / left.matrix_weights
        if share < 0.01:
            return Structure(dropped.layers, f"{dropped.note} No channels had to go.")
        made = replace(self, share=share).cut(left, base, folder)
        layers = [
            KeptLayer(sources[layer.source], layer.shape, layer.tensors) for layer in made.layers
        ]
        return Structure(layers, f"{dropped.note} {made.note}")

    def cut(self, model: WholeModel, base: WholeModel, folder: Path) -> Structure:
        """Return a model without its lowest units; arguments are those of `restructure`."""
        check_sliceable(self.name, model.config, model.layer(0))
        return self.cut_by(self.scores(model, base, folder), model)

    def cut_by(self, scores: Sequence[LayerScores], model: WholeModel) -> Structure:
        """Return a model without the units that `counts` says, the lowest scores first."""
        shapes = model.config.layers
        sizes = []
        for index, layer in enumerate(scores):
            weights = model.layer(index)
            sizes.append({name: unit_size(weights, shapes[index], name) for name in layer.units})
        counts = self.counts(scores, sizes, self.share * model.matrix_weights)
        layers = []
        for index, shape in enumerate(shapes):
            cut, tensors = self._cut(model.layer(index), shape, scores[index], counts[index])
            layers.append(KeptLayer(index, cut, tensors))
        widths = [layer.shape.intermediate for layer in layers]
        note = f"{self.name} left {min(widths)} to {max(widths)} MLP channels in a layer."
        return Structure(layers, note)

    def _cut(
        self,
        weights: Mapping[str, Tensor],
        shape: LayerConfig,
        scores: LayerScores,
        counts: Mapping[str, int],
    ) -> tuple[LayerConfig, dict[str, Tensor]]:
        """Return a layer with the best units, about as many of each part as `counts` says."""
        import torch

        tensors: dict[str, Tensor] = {}
        for name, own in scores.units.items():
            multiple = min(self.multiple, len(own)) if name == "down" else 1
            count = round(counts[name] / multiple) * multiple
            count = min(max(count, multiple), len(own))
            kept = own.argsort(descending=True, stable=True)[:count].sort().values
            if name == "down":
                shape, made = keep_channels(weights, shape, kept)
                columns = kept
            else:
                columns = group_columns(shape, kept)
                shape, made = keep_groups(weights, shape, kept)
            gone = torch.ones(weights[name].shape[1], dtype=torch.bool)
            gone[columns] = False
            tensors |= made | self.repair(weights, name, gone, scores.means)
        return shape, tensors


def unit_size(weights: Mapping[str, Tensor], shape: LayerConfig, name: str) -> int:
    """Return how many weights a channel (`down`) or a group of heads (`o`) has."""
    hidden = len(weights[name])
    if name == "down":
        return hidden * (2 + ("gate" in weights))
    return hidden * 2 * (shape.heads // shape.kv_heads + 1) * shape.head_dim


def per_unit(inputs: Tensor, name: str, shape: LayerConfig) -> Tensor:
    """Return the mean over the inputs [in] of `o` or `down` that belong to each unit, [units]."""
    return inputs if name == "down" else inputs.view(shape.kv_heads, -1).mean(1)


def coupled_sums(values: Mapping[str, Tensor], shape: LayerConfig) -> dict[str, Tensor]:
    """Return sums over all weights of a unit, float64 [units] for `o` and `down`.

    A channel has a row of `gate` and `up` and a column of `down`; a group of heads has rows of
    `q`, `k` and `v` and columns of `o`.

    Args:
        values: [out, in] by the names of the matrices.
        shape: of the layer.
    """
    sums = {}
    for name, makers in (("down", ("gate", "up")), ("o", ("q", "k", "v"))):
        if name not in values:
            continue
        units = shape.intermediate if name == "down" else shape.kv_heads
        total = values[name].double().sum(0).view(units, -1).sum(1)
        for each in makers:
            if each in values:
                total = total + values[each].double().sum(1).view(units, -1).sum(1)
        sums[name] = total
    return sums


def even_counts(scores: Sequence[LayerScores], shares: Sequence[float]) -> Counts:
    """Return how many units stay where each layer loses its own share of all of its parts."""
    return [
        {name: round((1 - share) * len(own)) for name, own in layer.units.items()}
        for layer, share in zip(scores, shares, strict=True)
    ]


def parts_of(weights: Mapping[str, Tensor]) -> list[str]:
    """Return which of `o` and `down` a layer has."""
    return [name for name in sorted(READERS, reverse=True) if name in weights]


def _bound(
    scores: Sequence[LayerScores], sizes: Sequence[Mapping[str, int]], removed: float
) -> float:
    """Return the score up to which units go, so that about so many weights do."""
    units = [
        (score, size[name])
        for layer, size in zip(scores, sizes, strict=True)
        for name, own in layer.units.items()
        for score in own.tolist()
    ]
    bound = float("-inf")
    for score, size in sorted(units):
        if removed <= 0:
            break
        bound, removed = score, removed - size
    return bound
