"""Hydra: one residual block a depth, over the target's hidden state and the path so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.core import Exactness
from paceline.drafters.heads.base import Head, HeadTarget, embed_path
from paceline.registry import Source, heads

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.drafters.heads.base import Parameters


@heads.register("hydra", Exactness.EXACT)
@dataclass(frozen=True)
class Hydra(Head):
    """Predict each later token from the hidden state and the tokens before it on its path.

    The logits at depth k are `unembedding @ (h + silu(W_k [h, e_1, ..., e_k] + b_k))` with the
    embeddings e of the path, scaled to a root mean square of 1. The output matrix and the
    embeddings are the target's, shared and frozen.

    Attributes:
        depth: heads, that is tokens predicted after the target's own next token. Default 4.
    """

    source = Source(
        authors="Ankner et al.",
        title="Hydra: Sequentially-Dependent Draft Heads for Medusa Decoding",
        arxiv="2402.05109",
        section="section 3",
    )
    catalogue = (493,)
    missing = {493: "Hydra++, whose heads are deeper and read the context through a layer"}

    def shapes(self, target: HeadTarget) -> dict[str, tuple[int, ...]]:
        """Return a matrix [D, (k + 1) D] and a bias [D] for each depth k."""
        size = target.hidden_size
        return {
            name: shape
            for k in range(1, self.depth + 1)
            for name, shape in ((f"{k}.weight", (size, (k + 1) * size)), (f"{k}.bias", (size,)))
        }

    def logits(
        self, parameters: Parameters, target: HeadTarget, hidden: Tensor, path: Tensor
    ) -> Tensor:
        """Return the logits [N, U] of the head of the path's length."""
        import torch
        from torch.nn import functional as F

        k = path.shape[1]
        whole = torch.cat([hidden, embed_path(target, path).flatten(1)], -1)
        block = F.silu(F.linear(whole, parameters[f"{k}.weight"], parameters[f"{k}.bias"]))
        return (hidden + block) @ target.unembedding.T
