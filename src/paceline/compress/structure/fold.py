"""FoldGPT: groups of neighbouring layers share the same matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.compress.structure.sharing.borrowing import Terms
from paceline.compress.structure.sharing.sharer import Sharer
from paceline.core import Exactness
from paceline.registry import Source, structures

if TYPE_CHECKING:
    from torch import Tensor


@structures.register("fold", Exactness.LOSSY)
@dataclass(frozen=True)
class Fold(Sharer):
    """Let groups of neighbouring layers share the matrices of the first one; norms stay apart.

    What is shared is stored, and in memory, once: a model of the same depth in fewer bytes, which
    computes as much as before. Groups grow layer by layer: among the `candidates` whose outputs
    change least, the one joins with which the model diverges least from what it was. Then norms,
    and products of low rank that are merged into the matrices, are trained towards the model as it
    was, as by `recover`. `layer_drop+fold` removes the least important layers first.

    Attributes:
        count: layers that lose their matrices, 1 to 1000. Default 3.
        candidates: layers that are tried for each, 1 to 1000. Default 8.
        rows: texts of calibration that they are judged by, 1 to 1000. Default 4.
        tokens: that are trained on, 0 to 10^9; 0 trains nothing. Default 32000.
        rate: of Adam at the beginning, up to 1; it falls to zero by a cosine. Default 0.001.
        batch: texts of a step, 1 to 1024. Default 2.
    """

    source = Source(
        authors="Liu et al.",
        title="FoldGPT: Simple and Effective Large Language Model Compression Scheme",
        arxiv="2407.00928",
        section="section 3",
        note="groups by the divergence that sharing makes, not by learnt gates",
    )
    catalogue = (214,)
    missing = {214: "learnable gates: layers are dropped by `layer_drop`, joined by divergence"}
    examples = ("fold:count=1,tokens=100", "layer_drop:count=1+fold:count=1")

    def terms(self, own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Terms:
        """Return none."""
        return {}
