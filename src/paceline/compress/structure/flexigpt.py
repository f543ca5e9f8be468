"""FlexiGPT: layers are replaced by others, with products of low rank that tell them apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.compress.base import MATRICES
from paceline.compress.structure.sharing.borrowing import Terms
from paceline.compress.structure.sharing.sharer import Sharer
from paceline.core import Exactness
from paceline.registry import Source, check_range, structures

if TYPE_CHECKING:
    from torch import Tensor


@structures.register("flexigpt", Exactness.LOSSY)
@dataclass(frozen=True)
class FlexiGPT(Sharer):
    """Replace layers by earlier ones, with products of low rank that make up for the difference.

    A layer that is replaced has the matrices of the nearest layer before that keeps its own, which
    are stored, and in memory, once, and of its own its norms and, in 8 bits, for each matrix the
    product of `rank` that is closest to the difference of the two (its singular vectors). Layers
    are chosen one by one: among the `candidates` whose outputs change least, the one with which the
    model diverges least from what it was. Then these products, all norms, and products of low rank
    that are merged into other matrices are trained towards the model as it was, as by `recover`.

    Attributes:
        count: layers that are replaced, 1 to 1000. Default 3.
        candidates: layers that are tried for each, 1 to 1000. Default 8.
        rows: texts of calibration that they are judged by, 1 to 1000. Default 4.
        tokens: that are trained on, 0 to 10^9; 0 trains nothing. Default 32000.
        rate: of Adam at the beginning, up to 1; it falls to zero by a cosine. Default 0.001.
        batch: texts of a step, 1 to 1024. Default 2.
        rank: of the products, 1 to 4096. Default 32.
    """

    rank: int = 32

    source = Source(
        authors="Smith et al.",
        title="FlexiGPT: Pruning and Extending Large Language Models with Low-Rank Weight Sharing",
        arxiv="2501.14713",
        section="section 3",
        note="layers are chosen by divergence; the norms of replaced layers are trained",
    )
    catalogue = (230,)
    missing = {230: "a scale of a replaced layer's outputs, and adding layers to a small model"}
    examples = ("flexigpt:count=1,rank=4,tokens=100",)

    def __post_init__(self) -> None:
        Sharer.__post_init__(self)
        check_range(1, 4096, self.name, rank=self.rank)

    def terms(self, own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Terms:
        """Return the products of the rank that are closest to the differences of matrices."""
        import torch

        found = {}
        for name in MATRICES:
            if name not in own:
                continue
            left, values, right = torch.linalg.svd(own[name] - theirs[name], full_matrices=False)
            roots = values[: self.rank].sqrt()
            found[name] = (left[:, : self.rank] * roots, roots[:, None] * right[: self.rank])
        return found
