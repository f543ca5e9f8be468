"""Matrices with two of every four inputs, as compressed-tensors stored them (sparse-24-bitmask).

A map [out, in] is `compressed` [out, in / 2], the kept values; `bitmask` uint8 [out, in / 8], a bit
for each input from the lowest up; and `shape` int64 [2, 1]. Releases up to 0.14 read and write it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.errors import ModelError
from paceline.models.formats.bits import packed_size
from paceline.models.formats.packed import (
    FLOATS,
    FileTensor,
    Packed,
    check_part,
    take_parts,
)
from paceline.models.formats.safetensors import Stored
from paceline.models.tensors import Sparse

FORMAT = "sparse-24-bitmask"
PATTERN = (2, 4)
_VALUES, _MASK, _SHAPE = "compressed", "bitmask", "shape"


def collect_sparse(folder: object, tensors: dict[str, FileTensor]) -> None:
    """Replace the parts of each sparse matrix by one tensor with the name of its weight.

    Raises:
        ModelError: a part is missing, or the parts do not fit together.
    """
    end = f".{_VALUES}"
    for name in [name for name in tensors if name.endswith(end)]:
        module = name.removesuffix(_VALUES)
        parts = take_parts(folder, tensors, module, (_VALUES, _MASK, _SHAPE))
        tensors[f"{module}weight"] = _matrix(f"{module!r:.80} of {folder}", parts)


def _matrix(what: str, parts: Mapping[str, Stored]) -> Packed:
    size, values = parts[_SHAPE].values.reshape(-1), parts[_VALUES]
    if size.shape != (2,) or size.dtype.kind not in "iu" or (size < 1).any() or size[1] % 4:
        raise ModelError(f"{what} has no shape of two numbers, inputs in fours; download it again")
    rows, inputs = map(int, size)
    check_part(f"{what}: {_VALUES}", values, FLOATS, (rows, inputs // 2))
    check_part(f"{what}: {_MASK}", parts[_MASK], ("U8",), (rows, packed_size(inputs, 1)))
    return Packed((rows, inputs), "sparse", partial(_read, parts, inputs))


def _read(parts: Mapping[str, Stored], inputs: int) -> Sparse:
    mask = np.unpackbits(parts[_MASK].values, axis=1, count=inputs, bitorder="little").astype(bool)
    values = parts[_VALUES]
    return Sparse(mask, np.ascontiguousarray(values.values).reshape(-1), values.dtype, PATTERN)


def save_sparse(matrix: Sparse) -> dict[str, NDArray[Any]]:
    """Return what follows the name of a module, for a matrix with two of every four inputs.

    Raises:
        ModelError: it has another pattern.
    """
    rows, inputs = matrix.shape
    if inputs % 4 or (matrix.mask.reshape(rows, -1, 4).sum(-1) != 2).any():
        raise ModelError(f"{FORMAT} holds two of every four inputs of a row, and nothing else")
    return {
        _VALUES: matrix.values.reshape(rows, inputs // 2),
        _MASK: np.packbits(matrix.mask, axis=1, bitorder="little"),
        _SHAPE: np.array(matrix.shape, np.int64).reshape(2, 1),
    }


def sparsity_config(ignore: list[str]) -> dict[str, Any]:
    """Return the `sparsity_config` of a checkpoint whose linear maps but some are sparse."""
    return {
        "format": FORMAT,
        "sparsity_structure": "2:4",
        "global_sparsity": 0.5,
        "targets": ["Linear"],
        "ignore": ignore,
        "registry_requires_subclass": False,
    }
