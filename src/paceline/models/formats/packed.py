"""Matrices that lie in several tensors of a checkpoint, whatever the layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from paceline.errors import ModelError
from paceline.models.formats.safetensors import Stored
from paceline.models.tensors import BlockQuantized, Linear, widen

FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A packed matrix whose parts were found and have the right shapes.

    Attributes:
        shape: outputs and inputs.
        format: name of the kind of matrix, e.g. `int4`.
        read: unpacks the codes, each time.
    """

    shape: tuple[int, int]
    format: str
    read: Callable[[], Linear]


FileTensor = Stored | Packed | BlockQuantized


class Packing(Protocol):
    """A layout of packed matrices, with the settings of one checkpoint."""

    def collect(self, folder: object, tensors: Mapping[str, Stored]) -> dict[str, FileTensor]:
        """Return the tensors with each packed matrix as one, under the name of its weight.

        Args:
            folder: where they are from, for errors.
            tensors: as the files hold them.

        Raises:
            ModelError: a part is missing, or the parts do not fit together.
        """


def take_parts(
    folder: object, tensors: dict[str, FileTensor], module: str, names: tuple[str, ...]
) -> dict[str, Stored]:
    """Remove and return the tensors of one matrix.

    Args:
        folder: for errors.
        tensors: the parts are removed from it.
        module: the beginning of their names, up to the last part's.
        names: the ends of their names; those that end in `?` may be absent.

    Raises:
        ModelError: one is missing.
    """
    parts: dict[str, Stored] = {}
    for name in names:
        part = tensors.pop(module + name.rstrip("?"), None)
        if isinstance(part, Stored):
            parts[name.rstrip("?")] = part
        elif not name.endswith("?"):
            raise ModelError(f"{module!r:.80} of {folder} lacks its {name}; download it again")
    return parts


def check_part(
    what: str, part: Stored, dtypes: tuple[str, ...], shape: tuple[int, ...]
) -> NDArray[Any]:
    """Return the values of a part that has the expected type and shape.

    Raises:
        ModelError: it has not.
    """
    if part.dtype not in dtypes or part.shape != shape:
        raise ModelError(
            f"{what} is {part.dtype} {list(part.shape)}, expected {' or '.join(dtypes)} "
            f"{list(shape)}"
        )
    return part.values


def group_count(inputs: int, group: int) -> int:
    """Return how many groups of at most `group` inputs a row has."""
    return -(-inputs // group)


def plain_zeros(zeros: NDArray[np.uint16], bits: int) -> NDArray[np.uint16] | None:
    """Return zero points, or None where all are the middle of the range."""
    return None if (zeros == 1 << (bits - 1)).all() else zeros


def plain_order(
    g_idx: NDArray[np.int32] | None, group: int, inputs: int
) -> NDArray[np.int32] | None:
    """Return the groups of the inputs, or None where these are in order."""
    if g_idx is None or np.array_equal(g_idx, np.arange(inputs) // group):
        return None
    return np.ascontiguousarray(g_idx)


def scale_rows(part: NDArray[Any], dtype: str, turned: bool) -> NDArray[np.float32]:
    """Return scales as float32 [out, groups]; `turned` ones are stored [groups, out]."""
    return np.ascontiguousarray(widen(part.T if turned else part, dtype))
