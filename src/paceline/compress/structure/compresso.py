"""Compresso: train masks with products of low rank beside frozen weights, sizes where they fall."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paceline.compress.structure.widths.gates import GatedLayer, Gates
from paceline.compress.structure.widths.masks import MaskTrainer
from paceline.core import Exactness
from paceline.registry import Source, structures


@structures.register("compresso", Exactness.LOSSY)
@dataclass(frozen=True)
class Compresso(MaskTrainer):
    """Train hard-concrete masks on MLP channels and groups of heads beside a LoRA of every matrix.

    One constraint holds the size of all layers together, so that each gets the widths that
    training finds. Products of low rank and norms are trained, and merged in the end. An
    interrupted training goes on where it was.

    Attributes:
        share: of the weights of the layers that is removed, 0.01 to 0.9. Default 0.2.
        multiple: widths of MLPs are rounded to multiples of it, 1 to 1024. Default 32.
        tokens: that are trained on, 1 to 10^9. Default 32000.
        rate: of Adam for products and norms at the beginning, 0 to 1. Default 0.001.
        gate_rate: of Adam for the gates, 0 to 10. Default 0.1.
        batch: texts of a step, 1 to 1024. Default 2.
    """

    source = Source(
        authors="Guo et al.",
        title="Compresso: Structured Pruning with Collaborative Prompting Learns Compact Large "
        "Language Models",
        arxiv="2310.05015",
        section="section 3.2",
        note="holds the size by projected gradients, not by trained multipliers, and distils from "
        "the original instead of tuning on instructions",
    )
    catalogue = (383,)
    missing = {383: "masks on the hidden size; the prompt that tells a model that it is pruned"}
    examples = ("compresso:multiple=4,tokens=200",)

    def constraints(self, layers: Sequence[GatedLayer]) -> list[list[Gates]]:
        """Return all gates together."""
        return [[each for layer in layers for each in layer.gates.values()]]
