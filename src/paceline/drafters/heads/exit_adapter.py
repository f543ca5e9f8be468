"""An exit with an adapter: the model's first layers draft, and a small block mends their states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.core import Exactness
from paceline.drafters.heads.base import ExitHead, HeadTarget, embed_path
from paceline.registry import Source, check_range, heads

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.drafters.heads.base import Parameters


@heads.register("exit_adapter", Exactness.EXACT, aliases=("kangaroo",))
@dataclass(frozen=True)
class ExitAdapter(ExitHead):
    """Predict the next token from the state behind the first layers.

    The state s behind `layers` layers, normed as the last one, becomes
    `s + A [s, e] + V (silu(G [s, e]) * U [s, e])` with the embedding e of the token, both scaled to
    a root mean square of 1 inside the brackets; the output matrix is the target's, shared and
    frozen. It learns the distributions of the whole model (self-distillation). Draft passes run the
    first layers over the tree with the target's own keys and values; drafting stops where the next
    pass is too unlikely to be of use (Kangaroo's second exit, `stop=confidence`), or by Thompson
    sampling (EESD, `stop=bandit`).

    Attributes:
        layers: first layers that a draft pass runs. Default 8.
        depth: predicted tokens of each state: 1.
        width: units of the block over the hidden size, 1 to 8. Default 2.
    """

    source = Source(
        authors="Liu et al.",
        title="Kangaroo: Lossless Self-Speculative Decoding via Double Early Exiting",
        arxiv="2404.18911",
        note="the adapter is an MLP; training as in EESD (arXiv 2406.03853)",
    )
    catalogue = (192,)
    missing = {192: "attention in the adapter, and reuse of the shallow states by the verification"}

    width: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(1, 8, self.name, width=self.width)

    def shapes(self, target: HeadTarget) -> dict[str, tuple[int, ...]]:
        """Return the four matrices."""
        size, inner = target.hidden_size, target.hidden_size * self.width
        return {
            "add": (size, 2 * size),
            "gate": (inner, 2 * size),
            "up": (inner, 2 * size),
            "down": (size, inner),
        }

    def initial(self, target: HeadTarget, seed: int) -> dict[str, Tensor]:
        """Return a block that leaves the state as it is: only what its units read is random."""
        import torch

        parameters = super().initial(target, seed)
        random = torch.Generator().manual_seed(seed)
        for name in ("gate", "up"):
            shape = parameters[name].shape
            parameters[name] = torch.randn(shape, generator=random) / shape[1] ** 0.5
        return parameters

    def logits(
        self, parameters: Parameters, target: HeadTarget, hidden: Tensor, path: Tensor
    ) -> Tensor:
        """Return the logits [N, U] of the token behind the state and its token."""
        import torch
        from torch.nn import functional as F

        token = embed_path(target, path[:, -1:])[:, 0]
        pair = torch.cat([F.rms_norm(hidden, hidden.shape[-1:]), token], -1)
        inner = F.silu(F.linear(pair, parameters["gate"])) * F.linear(pair, parameters["up"])
        state = hidden + F.linear(pair, parameters["add"]) + F.linear(inner, parameters["down"])
        return state @ target.unembedding.T
