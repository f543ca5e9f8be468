"""Layers of other shapes than their family has: settings that compression adds to config.json.

Methods that leave parts of a model out (`compress.structure`) write `layer_shapes`, a list with one
entry for each of the `num_hidden_layers` of the model that it was: null where the layer is gone,
else an object with `heads`, `kv_heads` and `intermediate`, of which 0 means that the layer has no
attention or no MLP, and, where the layer got a window, `window` and `sinks`; and `added_biases`,
names of matrices that got a bias. What else depends on the place of a layer stays what it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from paceline.errors import ModelError
from paceline.models.config import LayerConfig
from paceline.models.fields import LARGEST, Fields

SHAPES, BIASES = "layer_shapes", "added_biases"
_SIZES = ("heads", "kv_heads", "intermediate")
_NEAR = ("window", "sinks")
_BIASED = ("o", "down")


def read_layers(fields: Fields, layers: Sequence[LayerConfig]) -> tuple[LayerConfig, ...]:
    """Return the layers that a checkpoint has.

    Args:
        fields: settings of config.json.
        layers: of its family, as many as `num_hidden_layers` says.

    Raises:
        ModelError: an entry is missing, unknown, or larger than the layer was.
    """
    if SHAPES not in fields:
        return tuple(layers)
    entries = fields.get(SHAPES)
    if not isinstance(entries, list) or len(entries) != len(layers):
        raise fields.fail(SHAPES, f"a list with an entry for each of {len(layers)} layers")
    pairs = zip(entries, layers, strict=True)
    found = (_read(fields, index, *pair) for index, pair in enumerate(pairs))
    kept = tuple(layer for layer in found if layer is not None)
    if not kept:
        raise fields.fail(SHAPES, "an entry other than null for at least one layer")
    return kept


def _read(fields: Fields, index: int, entry: object, layer: LayerConfig) -> LayerConfig | None:
    """Return a layer as an entry says; None where it is gone."""
    if entry is None:
        return None
    where = f"{SHAPES}[{index}] of {fields.where}"
    if not isinstance(entry, dict) or set(entry) not in (set(_SIZES), {*_SIZES, *_NEAR}):
        raise ModelError(
            f"{where} is {entry!r:.120}, expected null or an object with {', '.join(_SIZES)}, and "
            f"where it got a window {' and '.join(_NEAR)}"
        )
    own = Fields(entry, where)
    heads, kv_heads, inner = (
        own.integer(name, low=0, high=getattr(layer, name)) for name in _SIZES
    )
    if not heads and not inner:
        raise ModelError(f"{where} has no heads and no intermediate, expected null for no layer")
    window, sinks = layer.window, layer.sinks
    if "window" in entry:
        window = own.integer("window", high=window or LARGEST)
        sinks = own.integer("sinks", low=0)
    return LayerConfig(heads, kv_heads, layer.head_dim, inner, window, layer.rope, sinks)


def read_biases(fields: Fields) -> frozenset[str]:
    """Return the matrices that got a bias.

    Raises:
        ModelError: the setting is no list of their names.
    """
    names = fields.get(BIASES, [])
    if not isinstance(names, list) or not all(name in _BIASED for name in names):
        raise fields.fail(BIASES, f"a list of {' and '.join(_BIASED)}")
    return frozenset(names)


def shape_settings(
    values: Mapping[str, Any],
    layers: Sequence[LayerConfig],
    kept: Sequence[tuple[int, LayerConfig]],
    biases: frozenset[str],
) -> dict[str, Any]:
    """Return what is added to the settings of a model some of whose parts were left out.

    Args:
        values: settings of the model, which may have had parts left out before.
        layers: of that model.
        kept: for each layer that is left, its index among these, and its new shape.
        biases: matrices that got a bias.
    """
    before = values.get(SHAPES) or [{}] * len(layers)
    places = [place for place, entry in enumerate(before) if entry is not None]
    entries: list[dict[str, int] | None] = [None] * len(before)
    for index, layer in kept:
        old, place = layers[index], places[index]
        same = (layer.window, layer.sinks) == (old.window, old.sinks)
        names = _SIZES if same and _NEAR[0] not in before[place] else (*_SIZES, *_NEAR)
        entries[place] = {name: getattr(layer, name) for name in names}
    settings: dict[str, Any] = {SHAPES: entries}
    if biases or values.get(BIASES):
        settings[BIASES] = sorted(biases | frozenset(values.get(BIASES) or ()))
    return settings


def plain_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Return settings without `layer_shapes` where nothing but whole layers was left out.

    Others stay as they are; who writes them for other programs compares what these would read.
    """
    entries = values.get(SHAPES)
    kept = [entry for entry in entries or () if entry is not None]
    if not kept or values.get(BIASES) or any(entry != kept[0] for entry in kept):
        return values
    if _NEAR[0] in kept[0]:
        return values
    rest = {name: value for name, value in values.items() if name not in (SHAPES, BIASES)}
    return rest | {"num_hidden_layers": len(kept)}
