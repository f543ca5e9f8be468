"""Sheared LLaMA: train masks towards one shape for all layers, together with the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from paceline.compress.structure.widths.gates import GatedLayer, Gates
from paceline.compress.structure.widths.masks import MaskTrainer
from paceline.compress.structure.widths.pruner import Counts, LayerScores, even_counts
from paceline.core import Exactness
from paceline.registry import Source, structures


@structures.register("sheared", Exactness.LOSSY)
@dataclass(frozen=True)
class Sheared(MaskTrainer):
    """Train hard-concrete masks on MLP channels and groups of heads, and all weights with them.

    Every part of every layer is held to the same share, so that all layers have one shape. Masks
    are trained towards the distributions of the original on the calibration texts; `recover`
    behind it is the continued training. An interrupted training goes on where it was.

    Attributes:
        share: of the weights of the layers that is removed, 0.01 to 0.9. Default 0.2.
        multiple: widths of MLPs are rounded to multiples of it, 1 to 1024. Default 32.
        tokens: that are trained on, 1 to 10^9. Default 32000.
        rate: of Adam for the weights at the beginning, 0 to 1. Default 0.0003.
        gate_rate: of Adam for the gates, 0 to 10. Default 0.1.
        batch: texts of a step, 1 to 1024. Default 2.
    """

    rate: float = 3e-4

    source = Source(
        authors="Xia et al.",
        title="Sheared LLaMA: Accelerating Language Model Pre-training via Structured Pruning",
        arxiv="2310.06694",
        section="section 2.1, equations 1 and 2",
        note="holds sizes by projected gradients, not by trained multipliers, and distils from the "
        "original; what was not trained is taken where it is better on held-out texts",
    )
    catalogue = (241,)
    missing = {
        241: "masks on whole layers and on the hidden size; dynamic batch loading over domains; "
        "billions of tokens, which take many GPUs"
    }
    examples = ("sheared:multiple=4,tokens=200",)

    parameters = "all"

    def constraints(self, layers: Sequence[GatedLayer]) -> list[list[Gates]]:
        """Return each part of each layer alone."""
        return [[each] for layer in layers for each in layer.gates.values()]

    def counts(
        self, scores: Sequence[LayerScores], sizes: Sequence[Mapping[str, int]], removed: float
    ) -> Counts:
        """Return the same share for every part of every layer."""
        return even_counts(scores, [self.share] * len(scores))
