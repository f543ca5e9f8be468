"""Attention skipping: layers that keep their MLP and lose their attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from paceline.compress.structure.base import PartRemover
from paceline.core import Exactness
from paceline.models.config import LayerConfig
from paceline.registry import Source, structures


@structures.register("attention_drop", Exactness.LOSSY)
@dataclass(frozen=True)
class AttentionDrop(PartRemover):
    """Remove the attention of some layers, which then hold no keys and values.

    The paper removes the attention of the last layers (`by=last`). Which layers do without depends
    on the model: small ones lose much with the last ones, so that they are chosen by what their
    attention changes.

    Attributes:
        count: layers that lose their attention, 1 to 1000. Default 3.
        by: what chooses: cosine, loss or last. Default loss.
        candidates: layers that are tried for each removal by loss, 2 to 1000. Default 8.
        rows: texts of calibration that removals are judged by, 1 to 1000. Default 4.
    """

    source = Source(
        authors="Tyukin",
        title="Enhancing Inference Efficiency of Large Language Models: Investigating Optimization "
        "Strategies and Architectural Innovations",
        arxiv="2404.05741",
        section="chapter on skipping late attention sublayers",
        note="layers are chosen by similarity or divergence; the paper's choice is `by=last`",
    )
    catalogue = (223,)
    examples = ("attention_drop:count=1", "attention_drop:count=1,by=last")
    parts: ClassVar[str] = "attentions"

    def removable(self, shape: LayerConfig) -> bool:
        """Return whether a layer has attention, and an MLP that stays."""
        return bool(shape.heads and shape.intermediate)

    def without(self, shape: LayerConfig) -> LayerConfig | None:
        """Return the shape of a layer with its MLP alone."""
        return replace(shape, heads=0, kv_heads=0)
