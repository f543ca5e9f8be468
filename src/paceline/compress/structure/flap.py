"""FLAP: remove the channels that change least, and add what they are on average as a bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from paceline.compress.structure.base import KeptLayer, Structure, StructureMethod
from paceline.compress.structure.widths.moments import Moments
from paceline.compress.structure.widths.slicing import (
    check_sliceable,
    group_columns,
    keep_channels,
    keep_groups,
)
from paceline.compress.whole_model import WholeModel
from paceline.core import Exactness
from paceline.registry import Source, check_range, structures

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.config import LayerConfig


@structures.register("flap", Exactness.LOSSY)
@dataclass(frozen=True)
class FLAP(StructureMethod):
    """Remove MLP channels and groups of heads by how much they fluctuate, without refitting.

    The score of an input of `down` or `o` is its variance times the squared norm of its weights; of
    a group of heads, the mean of its inputs. Scores are standardised within each layer, for
    attention and MLP apart, and the smallest ones of the whole model go. What a removed input is on
    average becomes part of a bias of `down` or `o`.

    Attributes:
        share: of the weights of the layers that is removed, 0.01 to 0.9. Default 0.2.
        multiple: widths of MLPs are rounded to multiples of it, 1 to 1024. Default 32.
    """

    share: float = 0.2
    multiple: int = 32

    source = Source(
        authors="An et al.",
        title="Fluctuation-based Adaptive Structured Pruning for Large Language Models",
        arxiv="2312.11983",
        section="section 3",
        note="heads that share a key/value head go together; widths are rounded to multiples",
    )
    catalogue = (227,)
    examples = ("flap:multiple=4", "flap:share=0.3,multiple=8")
    added_biases: ClassVar[frozenset[str]] = frozenset({"o", "down"})

    def __post_init__(self) -> None:
        check_range(0.01, 0.9, self.name, share=self.share)
        check_range(1, 1024, self.name, multiple=self.multiple)

    def restructure(self, model: WholeModel, base: WholeModel, folder: Path) -> Structure:
        """See `StructureMethod`."""
        check_sliceable(self.name, model.config, model.layer(0))
        means, scores, sizes, total = [], [], [], 0
        x = model.embed(model.texts)
        for index, shape in enumerate(model.config.layers):
            moments, weights = Moments(diagonal=True), model.layer(index)
            x = model.run(index, x, moments.tap())
            total += sum(each.numel() for each in weights.values() if each.dim() == 2)
            found, cost = {}, {}
            for name in ("o", "down"):
                if name in weights:
                    found[name] = _standardised(_scores(weights[name], moments, name, shape))
                    cost[name] = _size(weights, shape, name)
            means.append({name: moments.mean(name).float() for name in found})
            scores.append(found)
            sizes.append(cost)
        bound = _bound(scores, sizes, self.share * total)
        layers = []
        for index, shape in enumerate(model.config.layers):
            cut, tensors = self._cut(model.layer(index), shape, scores[index], means[index], bound)
            layers.append(KeptLayer(index, cut, tensors))
        widths = [layer.shape.intermediate for layer in layers]
        note = f"{self.name} left {min(widths)} to {max(widths)} MLP channels in a layer."
        return Structure(layers, note)

    def _cut(
        self,
        weights: Mapping[str, Tensor],
        shape: LayerConfig,
        scores: Mapping[str, Tensor],
        means: Mapping[str, Tensor],
        bound: float,
    ) -> tuple[LayerConfig, dict[str, Tensor]]:
        """Return a layer with the units above a score, and the means of the others as biases."""
        import torch

        tensors: dict[str, Tensor] = {}
        for name, own in scores.items():
            multiple = self.multiple if name == "down" else 1
            count = round(int((own > bound).sum()) / multiple) * multiple
            count = min(max(count, multiple), len(own))
            kept = own.argsort(descending=True)[:count].sort().values
            if name == "down":
                shape, made = keep_channels(weights, shape, kept)
                columns = kept
            else:
                columns = group_columns(shape, kept)
                shape, made = keep_groups(weights, shape, kept)
            gone = torch.ones(weights[name].shape[1], dtype=torch.bool)
            gone[columns] = False
            bias = weights[name][:, gone] @ means[name][gone]
            old = weights.get(f"{name}.bias")
            tensors |= made | {f"{name}.bias": bias if old is None else old + bias}
        return shape, tensors


def _scores(weight: Tensor, moments: Moments, name: str, shape: LayerConfig) -> Tensor:
    """Return the fluctuation of each unit of inputs, float64 [units]."""
    variance = (moments.moment(name) - moments.mean(name).square()).clamp(min=0)
    scores = variance * weight.double().square().sum(0)
    return scores if name == "down" else scores.view(shape.kv_heads, -1).mean(1)


def _standardised(scores: Tensor) -> Tensor:
    return (scores - scores.mean()) / (scores.std(correction=0) + 1e-12)


def _size(weights: Mapping[str, Tensor], shape: LayerConfig, name: str) -> int:
    """Return how many weights a unit has."""
    hidden = len(weights[name])
    if name == "down":
        return hidden * (2 + ("gate" in weights))
    return hidden * 2 * (shape.heads // shape.kv_heads + 1) * shape.head_dim


def _bound(scores: list[dict[str, Tensor]], sizes: list[dict[str, int]], wanted: float) -> float:
    """Return the score up to which units go, so that about `wanted` weights do."""
    units = [
        (score, size[name])
        for layer, size in zip(scores, sizes, strict=True)
        for name, own in layer.items()
        for score in own.tolist()
    ]
    bound = float("-inf")
    for score, size in sorted(units):
        if wanted <= 0:
            break
        bound, wanted = score, wanted - size
    return bound
