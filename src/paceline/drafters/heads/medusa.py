"""Medusa: one residual block a depth, over the target's hidden state alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.core import Exactness
from paceline.drafters.heads.base import Head, HeadTarget
from paceline.registry import Source, heads

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.drafters.heads.base import Parameters


@heads.register("medusa", Exactness.EXACT)
@dataclass(frozen=True)
class Medusa(Head):
    """Predict each later token from the hidden state by a residual block of its own.

    The logits at depth k are `unembedding @ (h + silu(W_k h + b_k))`; the tokens between are not
    looked at, so that all depths are known at once. W_k starts at 0: an untrained head predicts
    what the model itself does. The output matrix is the target's, shared and frozen.

    Attributes:
        depth: heads, that is tokens predicted after the target's own next token. Default 4.
    """

    source = Source(
        authors="Cai et al.",
        title="Medusa",
        arxiv="2401.10774",
        section="section 2.1.1",
        note="the output matrix is shared with the model, where the paper trains a copy a head",
    )
    catalogue = (474,)
    missing = {474: "Medusa-2, which trains the model along, and typical acceptance"}

    def shapes(self, target: HeadTarget) -> dict[str, tuple[int, ...]]:
        """Return a matrix [D, D] and a bias [D] for each depth."""
        size = target.hidden_size
        return {
            name: shape
            for k in range(1, self.depth + 1)
            for name, shape in ((f"{k}.weight", (size, size)), (f"{k}.bias", (size,)))
        }

    def logits(
        self, parameters: Parameters, target: HeadTarget, hidden: Tensor, path: Tensor
    ) -> Tensor:
        """Return the logits [N, U] of the head of the path's length."""
        from torch.nn import functional as F

        k = path.shape[1]
        block = F.silu(F.linear(hidden, parameters[f"{k}.weight"], parameters[f"{k}.bias"]))
        return (hidden + block) @ target.unembedding.T
