"""FLAP: remove the channels that change least, and add what they are on average as a bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from paceline.compress.structure.widths.moments import Moments
from paceline.compress.structure.widths.pruner import LayerScores, WidthPruner, parts_of, per_unit
from paceline.compress.whole_model import WholeModel
from paceline.core import Exactness
from paceline.registry import Source, structures

if TYPE_CHECKING:
    from torch import Tensor


@structures.register("flap", Exactness.LOSSY)
@dataclass(frozen=True)
class FLAP(WidthPruner):
    """Remove MLP channels and groups of heads by how much they fluctuate, without refitting.

    The score of an input of `down` or `o` is its variance times the squared norm of its weights; of
    a group of heads, the mean of its inputs. Scores are standardised within each layer, for
    attention and MLP apart, and the smallest ones of the whole model go. What a removed input is on
    average becomes part of a bias of `down` or `o`.

    Attributes:
        share: of the weights of the layers that is removed, 0.01 to 0.9. Default 0.2.
        multiple: widths of MLPs are rounded to multiples of it, 1 to 1024. Default 32.
    """

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

    def scores(self, model: WholeModel, base: WholeModel, folder: Path) -> list[LayerScores]:
        """Return the standardised fluctuation of each unit."""
        scores = []
        x = model.embed(model.texts)
        for index, shape in enumerate(model.config.layers):
            moments, weights = Moments(diagonal=True), model.layer(index)
            x = model.run(index, x, moments.tap())
            units, means = {}, {}
            for name in parts_of(weights):
                mean = moments.mean(name)
                variance = (moments.moment(name) - mean.square()).clamp(min=0)
                fluctuation = variance * weights[name].double().square().sum(0)
                units[name] = _standardised(per_unit(fluctuation, name, shape))
                means[name] = mean.float()
            scores.append(LayerScores(units, means))
        return scores

    def repair(
        self, weights: Mapping[str, Tensor], name: str, gone: Tensor, means: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the bias that has the means of the inputs that go."""
        bias = weights[name][:, gone] @ means[name][gone]
        old = weights.get(f"{name}.bias")
        return {f"{name}.bias": bias if old is None else old + bias}


def _standardised(scores: Tensor) -> Tensor:
    return (scores - scores.mean()) / (scores.std(correction=0) + 1e-12)
