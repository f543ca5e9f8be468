"""Tensors of a checkpoint to write, assembled from canonical weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.errors import ModelError
from paceline.models.tensor_names import Place, Shape
from paceline.models.tensors import (
    BitPlanes,
    BlockQuantized,
    Codebook,
    Dense,
    Grouped,
    Linear,
    LowRank,
    NestedCodes,
    PackedFloats,
    Pivoted,
    RoundedInputs,
    SignBlocks,
    Sparse,
    Sum,
    TensorTrain,
    Transformed,
    TwoGrained,
    Widths,
    to_dense,
)
from paceline.models.weights import Weights, part_rows

_PIECE = 1 << 22  # weights in memory at once, where a tensor is written by rows
Rows = NDArray[np.intp]
_FORMS: Mapping[type[Linear], str] = {
    BitPlanes: "bit planes",
    Codebook: "codebooks",
    Dense: "floating-point numbers",
    LowRank: "low-rank factors",
    NestedCodes: "codes of several widths",
    PackedFloats: "packed floating-point numbers",
    Pivoted: "rows and coefficients of low rank",
    RoundedInputs: "a matrix whose inputs are rounded",
    SignBlocks: "blocks of signs",
    Sparse: "a bitmap and its values",
    Sum: "a sum of matrices",
    TensorTrain: "a matrix product operator",
    Transformed: "a matrix whose inputs are transformed",
    TwoGrained: "integers whose scales are integers, too",
    Widths: "integers of several widths",
}


@dataclass(frozen=True)
class Assembled:
    """One tensor of a checkpoint.

    Attributes:
        name: without a prefix.
        shape: as it will be stored.
        parts: the canonical weights that it consists of, and where they lie in it, in the order of
            their rows.
    """

    name: str
    shape: Shape
    parts: tuple[tuple[str, Place], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical names of the parts."""
        return tuple(name for name, _ in self.parts)

    @property
    def is_matrix(self) -> bool:
        """Whether it has two axes."""
        return len(self.shape) == 2


def assemble(places: Mapping[str, Place]) -> list[Assembled]:
    """Return the tensors that hold canonical weights at `places`, in order.

    Of several names for the same rows the first counts.
    """
    tensors: dict[str, list[tuple[str, Place]]] = {}
    for name, place in places.items():
        parts = tensors.setdefault(place.tensor, [])
        if all(place != other for _, other in parts):
            parts.append((name, place))
    return [
        Assembled(tensor, parts[0][1].stored, tuple(sorted(parts, key=_first_row)))
        for tensor, parts in tensors.items()
    ]


def _first_row(part: tuple[str, Place]) -> int:
    return int(stored_rows(part[1]).min(initial=0))


def stored_rows(place: Place) -> Rows:
    """Return where each row of a canonical tensor lies in the stored one, transposed back."""
    count = place.stored[-1] if place.turned else place.stored[0]
    return part_rows(place, np.arange(count))


def row_pieces(weights: Weights, tensor: Assembled) -> Iterator[Linear]:
    """Yield the rows of a tensor whose parts follow one another (GGUF), some at a time.

    A vector is one row. Rows keep the form in which the source stores them.
    """
    for name, place in tensor.parts:
        matrix = as_matrix(weights[name])
        order = np.argsort(stored_rows(place))
        if not tensor.is_matrix:
            yield Dense(np.ascontiguousarray(matrix.dense()[:, order]))
            continue
        count, inputs = matrix.shape
        step = max(1, _PIECE // inputs)
        moved = bool((order[1:] < order[:-1]).any())
        for start in range(0, count, step):
            piece = slice(start, min(start + step, count))
            yield matrix.rows(order[piece] if moved else piece)


def whole(weights: Weights, tensor: Assembled) -> Floats:
    """Return a tensor as float32, fused, interleaved and transposed as its places say."""
    turned = tensor.parts[0][1].turned
    stored = np.empty(tensor.shape[::-1] if turned else tensor.shape, np.float32)
    filled = 0
    for name, place in tensor.parts:
        values = to_dense(weights[name])
        stored[stored_rows(place)] = values
        filled += len(values)
    if filled != len(stored):
        raise ModelError(f"tensor {tensor.name} has {filled} rows, expected {len(stored)}")
    return np.ascontiguousarray(stored.T) if turned else stored


def as_matrix(weight: Linear | Floats) -> Linear:
    """Return a weight as a matrix that other formats know; a vector becomes its only row.

    Two-grained scales become one number for each group, which is exact; tables stay as they are.
    """
    if isinstance(weight, TwoGrained):
        return weight.grouped or weight
    if isinstance(weight, Linear):
        return weight
    return Dense(np.ascontiguousarray(weight if weight.ndim == 2 else weight[None]))


def form_name(matrix: Linear) -> str:
    """Return what the form of a matrix is called in messages."""
    if isinstance(matrix, BlockQuantized):
        return f"blocks of {matrix.type}"
    if isinstance(matrix, TwoGrained) and matrix.levels is not None:
        return f"codes of a table of {len(matrix.levels)} levels"
    if not isinstance(matrix, Grouped):
        return _FORMS.get(type(matrix), type(matrix).__name__)
    zeros = " with zero points" if matrix.zeros is not None else ""
    minima = " with minima" if matrix.minima is not None else ""
    order = " in an order of its own" if matrix.g_idx is not None else ""
    return f"integers of {matrix.bits} bits in groups of {matrix.group}{zeros}{minima}{order}"
