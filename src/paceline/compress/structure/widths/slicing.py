"""The tensors of a layer that keeps some of its MLP channels and groups of heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from paceline.errors import MethodError
from paceline.models.config import LayerConfig, ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

# Matrices whose outputs are channels of a part, and the one whose inputs they are.
MLP, ATTENTION = ("gate", "up"), ("q", "k", "v")
READERS = {"down": "MLP channels", "o": "head groups"}


def check_sliceable(method: str, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
    """Refuse models with a norm over the channels that a method removes.

    Raises:
        MethodError: names the norm.
    """
    inner = [name for name in ("attn_inner_norm", "mlp_inner_norm") if name in weights]
    if config.qk_norm == "width" and "q_norm" in weights:
        inner.append("q_norm")
    if inner:
        raise MethodError(
            f"{method} removes channels, and the {inner[0]} of this model is over all of them; "
            "take layer_drop or attention_drop"
        )


def keep_channels(
    weights: Mapping[str, Tensor], shape: LayerConfig, channels: Tensor
) -> tuple[LayerConfig, dict[str, Tensor]]:
    """Return a layer with some MLP channels, int64 [kept], in order; `down` is cut, not fitted."""
    tensors = _rows(weights, MLP, dict.fromkeys(MLP, channels))
    tensors["down"] = weights["down"][:, channels]
    return replace(shape, intermediate=len(channels)), tensors


def keep_groups(
    weights: Mapping[str, Tensor], shape: LayerConfig, groups: Tensor
) -> tuple[LayerConfig, dict[str, Tensor]]:
    """Return a layer with some key/value heads and their queries, int64 [kept]; `o` is cut."""
    queries = group_columns(shape, groups)
    keys = (groups[:, None] * shape.head_dim + _arange(shape.head_dim)).flatten()
    tensors = _rows(weights, ATTENTION, {"q": queries, "k": keys, "v": keys})
    tensors["o"] = weights["o"][:, queries]
    times = shape.heads // shape.kv_heads
    return replace(shape, heads=len(groups) * times, kv_heads=len(groups)), tensors


def group_columns(shape: LayerConfig, groups: Tensor) -> Tensor:
    """Return the inputs of `o` that belong to some groups of heads, int64."""
    size = shape.heads // shape.kv_heads * shape.head_dim
    columns: Tensor = (groups[:, None] * size + _arange(size)).flatten()
    return columns


def _rows(
    weights: Mapping[str, Tensor], names: tuple[str, ...], rows: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return rows of matrices and their biases, as far as the layer has them."""
    found = {}
    for name in names:
        for full in (name, f"{name}.bias"):
            if full in weights:
                found[full] = weights[full][rows[name]]
    return found


def _arange(count: int) -> Tensor:
    import torch

    return torch.arange(count)
