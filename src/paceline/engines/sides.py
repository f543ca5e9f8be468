"""What an opened engine brings to a combination; see `paceline.compatibility`."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from paceline.compatibility import Side
from paceline.engines.kv_formats import grouped_format
from paceline.models.config import ModelConfig
from paceline.models.rope import DUAL_CHUNK

if TYPE_CHECKING:
    from paceline.engines.base import Engine


def engine_sides(engine: Engine) -> dict[Side, str]:
    """Return the attention pattern, exit policy and grouped cache that an engine has."""
    sides = model_sides(engine.config)
    if engine.pattern is not None:
        sides[Side.PATTERN] = f"the attention pattern {engine.pattern.name}"
    if engine.exits is not None:
        sides[Side.EXITS] = f"the exit policy {engine.exits.name}"
    if grouped_format(engine.kv_format) is not None:
        sides[Side.GROUPED_KV] = f"kv_format={engine.kv_format}"
    return sides


def model_sides(config: ModelConfig) -> dict[Side, str]:
    """Return the dual chunk attention of a model whose context was extended so."""
    ropes = [layer.rope for layer in config.layers if layer.rope is not None]
    if all(rope.scaling != DUAL_CHUNK for rope in ropes):
        return {}
    return {Side.DUAL_CHUNK: f"rope={DUAL_CHUNK}"}


def has_rectified_neurons(config: ModelConfig, names: Collection[str]) -> bool:
    """Return whether neurons of a model with weights of these names give 0 where ReLU does.

    Those of gated layers are not windowed, nor those with a norm behind the activation.
    """
    normed = any(name.endswith(".mlp_inner_norm") for name in names)
    return config.activation in ("relu", "relu2") and not config.gated and not normed
