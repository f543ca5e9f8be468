"""CFSP: blocks that change their inputs less lose more channels, all from one forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.compress.structure.widths.moments import Moments
from paceline.compress.structure.widths.pruner import Counts, LayerScores, WidthPruner, even_counts
from paceline.compress.whole_model import WholeModel
from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.registry import Source, check_range, structures

if TYPE_CHECKING:
    from torch import Tensor

_MOST = 0.95  # of the channels of a layer that may go


@structures.register("cfsp", Exactness.LOSSY)
@dataclass(frozen=True)
class CFSP(WidthPruner):
    """Remove MLP channels: coarse importance divides the budget, fine importance chooses channels.

    The coarse importance of a block is the angle between its inputs and outputs, mean over
    positions; blocks lose shares of their channels between which the sigmoid of the standardised
    importance decides. The fine importance of a channel is the norm of the inputs of `down` times
    its weights there, each relative to the sum of its row. Attention stays whole.

    Attributes:
        share: of the weights of the layers that is removed, 0.01 to 0.9. Default 0.2.
        multiple: widths of MLPs are rounded to multiples of it, 1 to 1024. Default 32.
        spread: how much the shares of blocks differ, 0 (not at all) to 10. Default 1.
    """

    spread: float = 1.0

    source = Source(
        authors="Wang et al.",
        title="CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine "
        "Activation Information",
        arxiv="2409.13199",
        section="section 3",
        note="only MLP channels go, as in the paper",
    )
    catalogue = (361,)
    missing = {361: "recovery whose ranks follow the importance of blocks; `+recover` has one rank"}
    examples = ("cfsp:multiple=4", "cfsp:share=0.3,multiple=8,spread=0")

    def __post_init__(self) -> None:
        WidthPruner.__post_init__(self)
        check_range(0.0, 10.0, self.name, spread=self.spread)

    def scores(self, model: WholeModel, base: WholeModel, folder: Path) -> list[LayerScores]:
        """Return the fine importance of each channel; the mean has the coarse one of the layer."""
        import torch
        from torch.nn import functional as F

        scores = []
        x = model.embed(model.texts)
        for index in range(len(model.config.layers)):
            moments, weights = Moments(diagonal=True), model.layer(index)
            after = model.run(index, x, moments.tap())
            cosine = F.cosine_similarity(x, after, dim=-1).clamp(-1, 1)
            coarse = torch.arccos(cosine).double().mean()
            x = after
            units = {}
            if "down" in weights:
                matrix = weights["down"].double().abs()
                relative = (matrix / matrix.sum(1, keepdim=True).clamp(min=1e-30)).sum(0)
                units["down"] = relative * moments.moment("down").double().sqrt()
            scores.append(LayerScores(units, {"coarse": coarse}))
        return scores

    def counts(
        self, scores: Sequence[LayerScores], sizes: Sequence[Mapping[str, int]], removed: float
    ) -> Counts:
        """Return the channels that stay by the coarse importance of each block.

        Raises:
            MethodError: the MLPs have fewer weights than shall go.
        """
        import torch

        weights = torch.tensor(
            [
                float(size["down"] * len(layer.units["down"])) if "down" in size else 0.0
                for size, layer in zip(sizes, scores, strict=True)
            ],
            dtype=torch.float64,
        )
        if removed > _MOST * float(weights.sum()):
            raise MethodError(
                f"{self.name}:share is {self.share}, which is more than all MLP channels of this "
                "model; take less, or narrow"
            )
        coarse = torch.stack([layer.means["coarse"] for layer in scores])
        standard = (coarse - coarse.mean()) / (coarse.std(correction=0) + 1e-12)
        wishes = torch.sigmoid(-self.spread * standard)
        return even_counts(scores, _scaled(wishes, weights, removed).tolist())


def _scaled(wishes: Tensor, weights: Tensor, removed: float) -> Tensor:
    """Return shares proportional to `wishes`, none above what may go, that remove enough."""
    low, high = 0.0, _MOST / float(wishes.min())
    for _ in range(60):
        middle = (low + high) / 2
        if float(((middle * wishes).clamp(max=_MOST) * weights).sum()) < removed:
            low = middle
        else:
            high = middle
    return (high * wishes).clamp(max=_MOST)
