"""What two descriptions of a model differ in: what is written is read again and compared."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields

import numpy as np

from paceline.models.config import LayerConfig, ModelConfig
from paceline.models.rope import DUAL_CHUNK, Rope

_CHECKED_POSITIONS = 64
_NOT_COMPARED = ("family", "norm_offset", "layers", "eos", "bos")
_WORDS = {"tied": "whether embedding and head are tied", "context": "the number of positions"}


def differences(ours: ModelConfig, other: ModelConfig) -> list[str]:
    """Return in words what `other` does not keep of `ours`.

    Names of families and offsets of norms do not count: weights hold these.
    """
    return [*_settings(ours, other), *_layers(ours, other)]


def _settings(ours: ModelConfig, other: ModelConfig) -> Iterator[str]:
    for field in fields(ModelConfig):
        if field.name in _NOT_COMPARED:
            continue
        one, two = getattr(ours, field.name), getattr(other, field.name)
        same = one == two
        if isinstance(one, float) and isinstance(two, float):
            same = math.isclose(one, two, rel_tol=1e-6)
        if not same:
            yield _WORDS.get(field.name, f"the {field.name.replace('_', ' ')}") + f" {one}"


def _layers(ours: ModelConfig, other: ModelConfig) -> Iterator[str]:
    if len(ours.layers) != len(other.layers):
        yield f"its {len(ours.layers)} layers"
        return
    pairs = list(zip(ours.layers, other.layers, strict=True))
    if any((a.window, a.sinks) != (b.window, b.sinks) for a, b in pairs):
        yield "the attention windows of its layers"
    if any(_sizes(a) != _sizes(b) for a, b in pairs):
        yield "the sizes of its layers"
    ropes = {(a.rope, b.rope) for a, b in pairs}
    if not all(_same_rope(a, b) for a, b in ropes):
        yield "its rotary embedding"


def _sizes(layer: LayerConfig) -> tuple[int, ...]:
    return layer.heads, layer.kv_heads, layer.head_dim, layer.intermediate


def _same_rope(one: Rope | None, two: Rope | None) -> bool:
    """Return whether two rotary embeddings turn by the same angles."""
    if one is None or two is None:
        return one is two
    if (one.dim, one.adjacent) != (two.dim, two.adjacent):
        return False
    if not math.isclose(one.query_growth, two.query_growth, rel_tol=1e-6):
        return False
    if one.query_growth and one.query_length != two.query_length:
        return False
    if {"dynamic", DUAL_CHUNK} & {one.scaling, two.scaling}:
        return one == two
    (cos, sin), (cos2, sin2) = (rope.table(0, _CHECKED_POSITIONS) for rope in (one, two))
    return np.allclose(cos, cos2, atol=1e-4) and np.allclose(sin, sin2, atol=1e-4)
