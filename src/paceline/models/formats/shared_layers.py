"""Layers of a checkpoint that share their matrices: stored, and held in memory, once.

`quantization_config` has `shared_layers`, an object that names, for a layer, an earlier one whose
matrices it has. What a file holds of such a layer's matrices are products of low rank (`LowRank`)
that are added to the shared ones; norms and biases are its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from paceline.errors import ModelError
from paceline.models.formats.packed import FileTensor
from paceline.models.tensor_names import Place
from paceline.models.tensors import LowRank

SHARED = "shared_layers"
SHARED_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


def read_shared(values: object) -> dict[int, int]:
    """Read the entry of a `quantization_config`: layer -> an earlier one with matrices of its own.

    Raises:
        ModelError: it is none.
    """
    found: dict[int, int] = {}
    for layer, source in values.items() if isinstance(values, Mapping) else ():
        known = isinstance(layer, str) and layer.isascii() and layer.isdecimal()
        if not known or type(source) is not int or not 0 <= source < int(layer[:9]):
            break
        found[int(layer[:9])] = source
    else:
        if isinstance(values, Mapping) and not found.keys() & set(found.values()):
            return found
    raise ModelError(
        f"{SHARED} in config.json is {values!r:.80}, expected layers, each with an earlier one "
        "that has matrices of its own"
    )


def share_places(
    folder: Path,
    places: Mapping[str, Place],
    tensors: Mapping[str, FileTensor],
    shared: Mapping[int, int],
) -> dict[str, Place]:
    """Return where tensors lie, those of shared layers where the others' do.

    Args:
        folder: for errors.
        places: of tensors under their canonical names.
        tensors: of the files.
        shared: layer -> the one whose matrices it has.

    Raises:
        ModelError: there is no such layer, it has another shape, or a matrix beside the shared one.
    """
    found = dict(places)
    for layer, source in shared.items():
        if not any(name.startswith(f"layers.{layer}.") for name in places):
            raise ModelError(f"{folder} shares matrices with layer {layer}, which it does not have")
        for part in SHARED_MATRICES:
            name, other = f"layers.{layer}.{part}", f"layers.{source}.{part}"
            own, theirs = places.get(name), places.get(other)
            if own is None and theirs is None:
                continue
            if own is None or theirs is None or own.shape != theirs.shape:
                raise ModelError(f"{folder} shares {other} with {name}, which has another shape")
            if name not in tensors:
                found[name] = theirs
            elif tensors[name].format == LowRank.__name__.lower():
                found[name] = replace(own, base=theirs)
            else:
                raise ModelError(f"{folder} holds {name}, and shares {other} with it")
    return found
