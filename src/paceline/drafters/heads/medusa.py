"""Medusa: one residual block a depth, over the target's hidden state alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.core import Exactness
from paceline.drafters.heads.base import Head, HeadTarget
from paceline.errors import MethodError
from paceline.registry import Source, check_range, heads

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.drafters.heads.base import Parameters


@heads.register("medusa", Exactness.EXACT)
@dataclass(frozen=True)
class Medusa(Head):
    """Predict each later token from the hidden state by a residual block of its own.

    The logits at depth k are `unembedding @ (h + silu(W_k h + b_k))`; the tokens between are not
    looked at, so that all depths are known at once. W_k starts at 0: an untrained head predicts
    what the model itself does. The output matrix is the target's, shared and frozen, or a trained
    copy for each depth. `head` also reads published Medusa heads (`medusa_lm_head.safetensors`).

    Attributes:
        depth: heads, that is tokens predicted after the target's own next token. Default 4.
        layers: residual blocks of a head. Default 1.
        output: `shared` or `own` output matrices. Default shared: a copy is V D numbers a depth.
    """

    source = Source(
        authors="Cai et al.",
        title="Medusa",
        arxiv="2401.10774",
        section="section 2.1.1",
        note="output=own is the paper's, which trains a copy of the output matrix a head",
    )
    catalogue = (474,)
    missing = {474: "Medusa-2, which trains the model along, and typical acceptance"}

    layers: int = 1
    output: str = "shared"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(1, 64, self.name, layers=self.layers)
        if self.output not in ("shared", "own"):
            raise MethodError(f"medusa:output is {self.output!r:.40}, expected shared or own")

    def shapes(self, target: HeadTarget) -> dict[str, tuple[int, ...]]:
        """Return a matrix [D, D] and a bias [D] for each block, and [V, D] for each own output."""
        size = target.hidden_size
        shapes: dict[str, tuple[int, ...]] = {}
        for k in range(1, self.depth + 1):
            for block in self._blocks(k):
                shapes |= {f"{block}.weight": (size, size), f"{block}.bias": (size,)}
            if self.output == "own":
                shapes[f"{k}.output"] = (target.vocab_size, size)
        return shapes

    def initial(self, target: HeadTarget, seed: int) -> dict[str, Tensor]:
        """Return blocks of 0, and the model's own output matrix for each own one."""
        parameters = super().initial(target, seed)
        for name in parameters:
            if name.endswith(".output"):
                parameters[name] = target.unembedding.clone()
        return parameters

    def columns(self, parameters: Parameters, tokens: Tensor) -> Parameters:
        """Return the tensors with the rows of some tokens in own output matrices."""
        if self.output == "shared":
            return parameters
        return {
            name: each[tokens] if name.endswith(".output") else each
            for name, each in parameters.items()
        }

    def logits(
        self, parameters: Parameters, target: HeadTarget, hidden: Tensor, path: Tensor
    ) -> Tensor:
        """Return the logits [N, U] of the head of the path's length."""
        from torch.nn import functional as F

        k = path.shape[1]
        for block in self._blocks(k):
            weight, bias = parameters[f"{block}.weight"], parameters[f"{block}.bias"]
            hidden = hidden + F.silu(F.linear(hidden, weight, bias))
        output = parameters.get(f"{k}.output", target.unembedding)
        return hidden @ output.T

    def _blocks(self, k: int) -> list[str]:
        """Return the names of the blocks of a head."""
        return [f"{k}", *(f"{k}.{layer}" for layer in range(2, self.layers + 1))]
