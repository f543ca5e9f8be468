"""Matrices in any stored form, as `paceline compress` writes them into a safetensors file.

Tensors have canonical names (see `tensor_names`), e.g. `layers.0.q`. A matrix in another form than
floating-point numbers is several tensors `NAME:PART`: `meta`, JSON in bytes with the form's name,
its shape and its numbers, and the arrays of `Linear.tensors`. Nothing of a file is executed, and no
form is read that is not one of `models.tensors`. `PackedFloats` are decoded when they are read, on
all cores, one matrix at a time: everything else sees the matrix that was packed. A checkpoint with
a base holds only what differs from it, see `base_checkpoint`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.errors import ModelError
from paceline.machine import usable_cores
from paceline.models.formats.base_checkpoint import BASE, Base
from paceline.models.formats.packed import FLOATS, FileTensor, Packed
from paceline.models.formats.safetensors import Stored
from paceline.models.formats.shared_layers import SHARED, read_shared
from paceline.models.tensors import Dense, Linear, PackedFloats, from_tensors
from paceline.models.tensors.base import META

QUANT_METHOD = "paceline"
VERSION = 1
_MARK = ":"


@dataclass(frozen=True)
class StoredForms:
    """The layout of a checkpoint that `paceline compress` wrote.

    Attributes:
        base: the checkpoint whose weights are read where this one holds none; None for no such.
        shared_layers: layers whose matrices are those of others, see `shared_layers`.
    """

    canonical = True  # names of tensors are ours, not those of the family

    base: Base | None = None
    shared_layers: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, scheme: Mapping[str, Any]) -> StoredForms:
        """Read a `quantization_config`.

        Raises:
            ModelError: a later version wrote it.
        """
        version = scheme.get("version")
        if version != VERSION:
            raise ModelError(
                f"the checkpoint has version {version!r:.20} of our stored forms, expected "
                f"{VERSION}; a newer Paceline reads it"
            )
        base = None if scheme.get(BASE) is None else Base.of(scheme[BASE])
        return cls(base, read_shared(scheme.get(SHARED, {})))

    def collect(self, folder: object, tensors: Mapping[str, Stored]) -> dict[str, FileTensor]:
        """Return the tensors with each matrix as one; see `Packing.collect`."""
        rest: dict[str, FileTensor] = {}
        parts: dict[str, dict[str, Stored]] = {}
        for name, tensor in tensors.items():
            owner, mark, part = name.partition(_MARK)
            if mark:
                parts.setdefault(owner, {})[part] = tensor
            else:
                rest[name] = tensor
        for name, arrays in parts.items():
            what = f"{name!r:.80} of {folder}"
            if name in rest:
                raise ModelError(f"{folder} holds tensor {name!r:.80} in two forms")
            if self.base is None:
                rest[name] = _packed(what, arrays)
            else:
                rest[name] = self.base.changed(what, name, _packed(what, arrays))
        return rest if self.base is None else self.base.completed(rest)


def scheme(recipe: str, base: Base | None = None) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint that a recipe made."""
    values: dict[str, Any] = {"quant_method": QUANT_METHOD, "version": VERSION, "recipe": recipe}
    return values if base is None else values | {BASE: base.values}


def arrays_of(name: str, weight: Linear | NDArray[Any]) -> dict[str, tuple[str, NDArray[Any]]]:
    """Return (type, values) of the tensors that hold a weight, by their names in the file.

    Types are those of safetensors; bfloat16 values are bits in uint16.
    """
    if isinstance(weight, Dense):
        return {name: (weight.dtype, weight.values)}
    if not isinstance(weight, Linear):
        return {name: (_type(weight), weight)}
    stored = dict(weight.tensors())
    meta = json.loads(bytes(stored[META])) | {"shape": list(weight.shape)}
    stored[META] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    return {f"{name}{_MARK}{part}": (_type(array), array) for part, array in stored.items()}


def _type(array: NDArray[Any]) -> str:
    from paceline.models.formats.writer import type_name

    return type_name(array.dtype.newbyteorder("<"))


def _packed(what: str, arrays: Mapping[str, Stored]) -> Packed:
    try:
        meta = json.loads(bytes(arrays[META].values))
        form, (rows, columns) = meta["form"], meta["shape"]
        known = isinstance(form, str) and all(type(size) is int for size in (rows, columns))
    except (LookupError, TypeError, ValueError, RecursionError):
        known = False
    if not known:
        raise ModelError(f"{what} has no description of its form and shape; download it again")
    packs_floats = form == PackedFloats.__name__ and meta.get("dtype") in FLOATS
    name = str(meta["dtype"] if packs_floats else form).lower()  # decoded as soon as it is read
    return Packed((rows, columns), name, partial(_read, what, (rows, columns), arrays))


def _read(what: str, shape: tuple[int, int], arrays: Mapping[str, Stored]) -> Linear:
    matrix = from_tensors({name: stored.values for name, stored in arrays.items()})
    if matrix.shape != shape:  # before anything is decoded that claims to be large
        raise ModelError(f"{what} has the shape {list(matrix.shape)}, and says {list(shape)}")
    return matrix.unpack(usable_cores()) if isinstance(matrix, PackedFloats) else matrix
