"""One decoder block of which some nodes leave parts out; otherwise as `blocks.block`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from paceline.models import blocks
from paceline.models.config import LayerConfig, ModelConfig


@dataclass(frozen=True, eq=False)
class ExitPass:
    """The nodes of one pass.

    Attributes:
        layers: number of the model's layers.
        at: int64 [N], positions.
        full: bool [N], nodes that run everything: those of a prompt.
        logits: returns the logits [N, V] of states [N, D], as if the later layers were left out.
    """

    layers: int
    at: Tensor
    full: Tensor
    logits: Callable[[Tensor], Tensor]


class BlockGate(Protocol):
    """What says which nodes run what; see `exits.base.Gate`."""

    def attention(self, layer: int) -> Tensor:
        """Return which nodes run the attention of a layer, bool [N]."""
        ...

    def mlp(self, layer: int) -> Tensor:
        """Return which nodes run the MLP of a layer, bool [N]."""
        ...

    def note(self, layer: int, before: Tensor, middle: Tensor, after: Tensor) -> None:
        """See the states of a layer, [N, D]: its input, behind its attention, and its output."""
        ...


def gated_block(
    index: int,
    gate: BlockGate,
    x: Tensor,
    config: ModelConfig,
    layer: LayerConfig,
    weights: blocks.LayerWeights,
    mask: blocks.Mask,
    rotation: blocks.Rotation | None,
    cache: blocks.Cache | blocks.LatentCache | None = None,
    tap: blocks.Tap | None = None,
) -> tuple[Tensor, int, int]:
    """Run a block with what its gate leaves.

    Keys and values of all nodes are computed and cached, of the states that reach the layer.

    Args:
        index: of the layer.
        gate: says who runs what, and sees the states.
        x: [N, hidden].
        config: as `blocks.block`, like all that follow.
        layer: likewise.
        weights: likewise.
        mask: likewise.
        rotation: likewise.
        cache: likewise.
        tap: likewise.

    Returns:
        [N, hidden], and how many nodes ran the attention and the MLP.
    """
    middle = x
    attends = gate.attention(index)
    if layer.heads:
        normed = blocks.norm(x, config, weights, "attn_norm")
        attended = blocks.attention(normed, config, layer, weights, mask, rotation, cache, tap)
        attended = blocks.norm(attended, config, weights, "attn_post_norm")
        added = blocks.scaled(attended, config.residual_scale)
        middle = torch.where(attends[:, None], x + added, x)
    after, feeds = middle, gate.mlp(index)
    if layer.intermediate and bool(feeds.any()):
        rows = (x if config.parallel else middle)[feeds]
        made = blocks.mlp(blocks.norm(rows, config, weights, "mlp_norm"), config, weights, tap)
        after = middle.clone()
        after[feeds] += blocks.scaled(made, config.residual_scale)
    gate.note(index, x, middle, after)
    return after, int(attends.sum()), int(feeds.sum())
