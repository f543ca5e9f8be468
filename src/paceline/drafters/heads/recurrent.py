"""A recurrent head: one cell takes the hidden state on by a token at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.core import Exactness
from paceline.drafters.heads.base import Head, HeadTarget, embed_path
from paceline.registry import Source, check_range, heads

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.drafters.heads.base import Parameters


@heads.register("recurrent", Exactness.EXACT, aliases=("clover",))
@dataclass(frozen=True)
class Recurrent(Head):
    """Predict each later token by a cell that consumes the path, token by token.

    The state begins as the target's hidden state h; each token x of the path takes it to
    `s + V silu(W [s, e(x)] + b)`, with the embedding e scaled to a root mean square of 1, and the
    logits are `unembedding @ s`. All depths share the cell. The output matrix and the embeddings
    are the target's, shared and frozen.

    Attributes:
        depth: tokens predicted after the target's own next token. Default 4.
        width: units of the cell over the hidden size, 1 to 8. Default 2.
    """

    source = Source(
        authors="Xiao et al.",
        title="Clover-2: Accurate Inference for Regressive Lightweight Speculative Decoding",
        arxiv="2408.00264",
        note="the regressive cell and soft targets; no attention over the context",
    )
    catalogue = (98,)
    missing = {98: "the augmenting block, which reads the context, and the output projector"}

    width: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(1, 8, self.name, width=self.width)

    def shapes(self, target: HeadTarget) -> dict[str, tuple[int, ...]]:
        """Return the cell: two matrices and a bias."""
        size, inner = target.hidden_size, target.hidden_size * self.width
        return {"in": (inner, 2 * size), "bias": (inner,), "out": (size, inner)}

    def initial(self, target: HeadTarget, seed: int) -> dict[str, Tensor]:
        """Return a cell that leaves the state as it is: only what its units read is random."""
        import torch

        parameters = super().initial(target, seed)
        shape = parameters["in"].shape
        random = torch.Generator().manual_seed(seed)
        return parameters | {"in": torch.randn(shape, generator=random) / shape[1] ** 0.5}

    def logits(
        self, parameters: Parameters, target: HeadTarget, hidden: Tensor, path: Tensor
    ) -> Tensor:
        """Return the logits [N, U] after the cell has consumed the path."""
        import torch
        from torch.nn import functional as F

        state = hidden
        for token in embed_path(target, path).unbind(1):
            inner = F.linear(torch.cat([state, token], -1), parameters["in"], parameters["bias"])
            state = state + F.linear(F.silu(inner), parameters["out"])
        return state @ target.unembedding.T
