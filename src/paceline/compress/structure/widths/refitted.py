"""Layers that lose channels or heads, one after another; what stays is refitted each time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from paceline.compress.structure.base import KeptLayer, kept_tensors
from paceline.compress.structure.widths.moments import Moments
from paceline.compress.structure.widths.removal import refit, removal
from paceline.compress.structure.widths.slicing import group_columns, keep_channels, keep_groups
from paceline.compress.whole_model import WholeModel, run_frozen
from paceline.models.config import LayerConfig

if TYPE_CHECKING:
    from torch import Tensor


def unit_inputs(shape: LayerConfig, name: str) -> int:
    """Return how many inputs of `down` or `o` a channel or a group of heads has."""
    return 1 if name == "down" else shape.heads // shape.kv_heads * shape.head_dim


def units_in(shape: LayerConfig, name: str) -> int:
    """Return how many channels (`down`) or groups of heads (`o`) a layer has."""
    return shape.intermediate if name == "down" else shape.kv_heads


def without_part(shape: LayerConfig, name: str) -> LayerConfig:
    """Return a layer without its MLP (`down`) or its attention (`o`)."""
    return replace(shape, intermediate=0) if name == "down" else replace(shape, heads=0, kv_heads=0)


def cut_and_refit(
    weights: Mapping[str, Tensor], shape: LayerConfig, name: str, gone: Tensor, moment: Tensor
) -> tuple[LayerConfig, dict[str, Tensor]]:
    """Return a layer without some units, and the tensors that change.

    Args:
        weights: of the layer.
        shape: of the layer.
        name: `down` or `o`, whose inputs go; it is fitted to the outputs that it had.
        gone: int64, units.
        moment: [in, in], second moment of its inputs.
    """
    import torch

    stay = torch.ones(units_in(shape, name), dtype=torch.bool)
    stay[gone] = False
    kept = stay.nonzero()[:, 0]
    if name == "down":
        columns = kept
        shape, made = keep_channels(weights, shape, kept)
    else:
        columns = group_columns(shape, kept)
        shape, made = keep_groups(weights, shape, kept)
    cross = weights[name].double() @ moment[:, columns].double()
    made[name] = refit(cross, moment[columns][:, columns])
    return shape, made


def narrowed_layers(
    model: WholeModel,
    removed: Mapping[tuple[int, str], int],
    sensitivities: Sequence[Mapping[str, Tensor]],
) -> Iterator[KeptLayer]:
    """Yield narrower layers, each fitted on the outputs of those before it.

    Args:
        model: that loses units.
        removed: how many, by the index of the layer and the name (`down`, `o`); parts that lose
            all of them go, and layers without parts are left out.
        sensitivities: how much errors of the outputs of `down` and `o` cost, for each layer.
    """
    x = model.embed(model.texts)
    for index, shape in enumerate(model.config.layers):
        tensors = dict(model.layer(index))
        new: dict[str, Tensor] = {}
        for name in ("o", "down"):  # attention first: the MLP sees what is left of it
            count = removed.get((index, name), 0)
            if count >= units_in(shape, name):
                shape = without_part(shape, name)
            elif count:
                moments = Moments()
                run_frozen(model.config, shape, tensors, x, moments.tap())
                moment, size = moments.moment(name), unit_inputs(shape, name)
                weigh = sensitivities[index][name]
                order = removal(tensors[name], moment, weigh, size, count).order
                shape, made = cut_and_refit(tensors, shape, name, order, moment)
                tensors |= made
                new |= made
        if shape.heads or shape.intermediate:
            x = run_frozen(model.config, shape, tensors, x)
            yield KeptLayer(index, shape, kept_tensors(new, shape))
