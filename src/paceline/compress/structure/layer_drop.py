"""Layer dropping: a shallower model of the layers that matter on the calibration texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from paceline.compress.structure.base import PartRemover
from paceline.core import Exactness
from paceline.models.config import LayerConfig
from paceline.registry import Source, structures


@structures.register("layer_drop", Exactness.LOSSY)
@dataclass(frozen=True)
class LayerDrop(PartRemover):
    """Remove whole layers, those whose removal costs least on the calibration texts.

    Each removed layer saves its weights, its products and its rows of keys and values. Texts of a
    domain keep what that domain needs. Progressive dropping is a recipe that recovers in between:
    `layer_drop:count=3+recover+layer_drop:count=3+recover`.

    Attributes:
        count: layers to remove, 1 to 1000. Default 3.
        by: what chooses: cosine, loss or last. Default loss.
        candidates: layers that are tried for each removal by loss, 2 to 1000. Default 8.
        rows: texts of calibration that removals are judged by, 1 to 1000. Default 4.
    """

    source = Source(
        authors="Hu et al.",
        title="TrimLLM: Progressive Layer Dropping for Domain-Specific LLMs",
        arxiv="2412.11242",
        section="section 3",
        note="layers are chosen by the divergence from the model as it was, not by task accuracy",
    )
    catalogue = (273,)
    missing = {273: "no tuning on labels of the domain: `recover` distils from the original"}
    examples = ("layer_drop:count=1", "layer_drop:count=1,by=cosine")
    whole_layers: ClassVar[bool] = True
    parts: ClassVar[str] = "layers"

    def removable(self, shape: LayerConfig) -> bool:
        """Return True: every layer can go."""
        return True

    def without(self, shape: LayerConfig) -> LayerConfig | None:
        """Return None: nothing of the layer is left."""
        return None
