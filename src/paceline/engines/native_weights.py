"""How weights go into the native engine: kept as they are stored where a format holds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paceline import _native
from paceline.core import Floats
from paceline.engines.formats import (
    BITS,
    GGUF_FORMATS,
    GROUP_FORMATS,
    ROW_FORMATS,
    SPARSE_FORMATS,
    Format,
)
from paceline.engines.row_codes import Rows
from paceline.errors import ModelError
from paceline.models.formats.safetensors import Stored, is_mapped
from paceline.models.tensors import (
    BlockQuantized,
    Dense,
    Grouped,
    Linear,
    Sparse,
    TwoGrained,
    narrow,
    to_dense,
    widen,
)
from paceline.models.weights import Weights

ENOUGH = 1.02  # a format this much larger than the smallest is taken if it stands before it
_BITMAP = "bitmap8"  # says with its groups how many weights are not zero
_GAIN = 0.75  # of the bits of `group8`, above which a bitmap is not worth its time
_STEP_BITS = 6  # of scales in two grains, at most; others become scales of their own
_IN_BYTES = {"int8": "group8", "int4": "group4"}  # the same values, for activations of 8 bits
FLOATS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}  # types in files -> formats
_FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}

Weight = Linear | Stored | Floats


@dataclass(frozen=True, eq=False)
class Blocks:
    """A matrix of integers as the kernels take it: every 32 inputs in a row belong to one group.

    Attributes:
        bits: of a code.
        codes: uint8 [out, in], inputs in the order of `order`.
        scales: float32 [out, groups]; with `steps`, [out, 1].
        zeros: uint16 [out, groups], or None for half the range.
        block_groups: int32 [blocks], the group of each block.
        order: int32 [in], which input comes at each place; None where they are in order.
        steps: uint8 [out, groups], which scales of a row, [out, 1], are multiplied with; or None.
        levels: int8 [2 ** bits], what codes stand for; or None.
    """

    bits: int
    codes: NDArray[np.uint8]
    scales: Floats
    zeros: NDArray[np.uint16] | None
    block_groups: NDArray[np.int32]
    order: NDArray[np.int32] | None = None
    steps: NDArray[np.uint8] | None = None
    levels: NDArray[np.int8] | None = None

    @classmethod
    def of(cls, matrix: Linear) -> Blocks | None:
        """Return a matrix in blocks; None where its groups do not fall so, or it has minima."""
        if isinstance(matrix, TwoGrained):
            return cls._of_two_grained(matrix)
        if not isinstance(matrix, Grouped) or matrix.minima is not None:
            return None
        groups, codes, order = matrix.groups.astype(np.int32), matrix.codes, None
        if matrix.g_idx is not None:
            order = np.argsort(groups, kind="stable").astype(np.int32)
            groups, codes = groups[order], np.ascontiguousarray(codes[:, order])
        starts = _starts(groups)
        if starts is None:
            return None
        return cls(matrix.bits, codes, matrix.scales, matrix.zeros, starts, order)

    @classmethod
    def _of_two_grained(cls, matrix: TwoGrained) -> Blocks | None:
        if matrix.step_bits > _STEP_BITS:
            return None if matrix.grouped is None else cls.of(matrix.grouped)
        starts = _starts((np.arange(matrix.shape[1]) // matrix.group).astype(np.int32))
        if starts is None:
            return None
        return cls(
            matrix.bits,
            matrix.codes,
            np.ascontiguousarray(matrix.units[:, None]),
            None if matrix.zeros is None else matrix.zeros.astype(np.uint16),
            starts,
            steps=matrix.steps,
            levels=matrix.levels,
        )

    @property
    def size(self) -> int:
        """Blocks of a group where all have as many, but for the last one of a row; else 0."""
        size = int(np.count_nonzero(self.block_groups == self.block_groups[:1]))
        even = np.arange(len(self.block_groups)) // max(size, 1)
        return size if np.array_equal(even, self.block_groups) else 0

    def fits(self, name: str) -> bool:
        """Whether a format keeps these integers and scales as they are."""
        if name in GROUP_FORMATS + SPARSE_FORMATS and not self.size:
            return False
        sparse = name in SPARSE_FORMATS
        return _native.format_holds(
            name,
            self.bits,
            self.scales,
            self.zeros,
            self.steps,
            self.levels,
            self.codes if sparse else None,
            self.block_groups if sparse else None,
        )

    def group_in(self, name: str) -> int:
        """Return the `group` that `set_format` takes."""
        if name == _BITMAP:
            parts = (self.bits, self.codes, self.scales, self.zeros, self.block_groups)
            return _native.sparse_group(*parts, self.size)
        return self.size if name in GROUP_FORMATS + SPARSE_FORMATS else 1

    def bits_in(self, name: str) -> float:
        """Bits of a weight in a format that it fits."""
        return _native.format_bits(name, self.codes.shape[1], self.group_in(name))

    def kept_in(self, names: Iterable[str]) -> str | None:
        """Return the format of `names` that keeps this matrix in the fewest bits, or about as many.

        None where no format keeps it. The first one of those that are about as small counts.
        """
        apart = () if self.size else GROUP_FORMATS + SPARSE_FORMATS
        if self.steps is not None:
            apart += SPARSE_FORMATS
        bits = {name: self.bits_in(name) for name in names if name not in apart}
        if _BITMAP in bits and "group8" in bits and bits[_BITMAP] > _GAIN * bits["group8"]:
            del bits[_BITMAP]
        smallest = next(
            (name for name in sorted(bits, key=lambda n: bits[n]) if self.fits(name)), ""
        )
        enough = ENOUGH * bits.get(smallest, 0)
        return next((name for name in bits if bits[name] <= enough and self.fits(name)), None)


def _starts(groups: NDArray[np.int32]) -> NDArray[np.int32] | None:
    """Return the group of each block [blocks], from that of each input; None where blocks mix."""
    starts = np.ascontiguousarray(groups[:: _native.BLOCK_INPUTS])
    whole = np.repeat(starts, _native.BLOCK_INPUTS)[: len(groups)]
    return starts if np.array_equal(whole, groups) else None


def load_weights(
    model: _native.NativeModel,
    weights: Mapping[str, Linear | Floats],
    chosen: Format | None,
    in_bytes: bool = False,
) -> Format:
    """Put all weights into a model.

    Args:
        model: takes them.
        weights: by canonical name. Those of a checkpoint are read as it holds them.
        chosen: the formats, or None to keep each matrix as it is stored.
        in_bytes: whether they shall be such as can be multiplied with activations of 8 bits.

    Returns:
        the formats in use; several of the layers are joined by `+`, the largest part first.

    Raises:
        ModelError, ValueError: a weight does not belong to the model, or cannot be kept.
    """
    sizes: tuple[dict[str, int], dict[str, int]] = ({}, {})  # of the layers; of embedding and head
    done: set[str] = set()
    vectors: list[str] = []
    for name in sorted(weights, key=_layer):
        if name in done:
            continue
        parts = _beside(name, weights)
        done.update(parts)
        read = {part: _read(weights, part) for part in parts}
        matrices = {part: each for part, each in read.items() if isinstance(each, Linear)}
        if name == "positions":
            matrices = {}
        vectors.extend(part for part in read if part not in matrices)
        if not matrices:
            continue
        in_layers = name.startswith("layers.")
        form = None if chosen is None else chosen.layers if in_layers else chosen.head
        count = sizes[0] if in_layers else sizes[1]
        _load_together(model, matrices, form, count, in_bytes)
    for name in vectors:  # biases last: they lie as the panels of their matrices do
        model.set(name, *_floats(_read(weights, name)))
    names = ["+".join(sorted(each, key=lambda form: -each[form])) for each in sizes]
    return Format(names[0] or names[1], names[1])


def expands(matrix: Linear) -> bool:
    """Return whether the engine holds a matrix as floating-point numbers, not as it is stored."""
    return _plan(matrix, in_bytes=False)[0] in FLOATS.values()


def _load_together(
    model: _native.NativeModel,
    matrices: Mapping[str, Linear],
    form: str | None,
    count: dict[str, int],
    in_bytes: bool,
) -> None:
    """Load the matrices that one product multiplies with, each in its own format.

    Args:
        model: takes them.
        matrices: by canonical name.
        form: the format of all; None keeps each as it is stored.
        count: number of weights by format, which is added to.
        in_bytes: as for `load_weights`.
    """
    if in_bytes and form is not None:
        form = _IN_BYTES.get(form, form)
    plans: dict[str, tuple[str, Blocks | Rows | None]] = {}
    for name, matrix in matrices.items():
        plans[name] = (form, None) if form is not None else _plan(matrix, in_bytes)
        if form is not None and (block := Blocks.of(matrix)) and block.fits(form):
            plans[name] = (form, block)
    first, *others = (
        each.order if isinstance(each, Blocks) else None for _, each in plans.values()
    )
    apart = not all(_same_order(first, order) for order in others)
    for name, (kept, packed) in plans.items():
        group = 1 if packed is None else packed.group_in(kept)
        model.set_format(name, kept, apart, group)
        rows, inputs = matrices[name].shape
        count[kept] = count.get(kept, 0) + rows * inputs
    for name, (kept, packed) in plans.items():
        matrix = matrices[name]
        if isinstance(matrix, BlockQuantized) and matrix.format == kept:
            _load_blocks(model, name, matrix)
        elif isinstance(packed, Rows):
            model.load_blocks(name, packed.data, packed.inputs)
        elif packed is not None:
            _load(model, name, packed)
        else:
            model.set(name, *_floats(matrix))


def _load_blocks(model: _native.NativeModel, name: str, matrix: BlockQuantized) -> None:
    data = np.ascontiguousarray(matrix.data)
    model.load_blocks(name, data, matrix.inputs, is_mapped(data))


def _load(model: _native.NativeModel, name: str, block: Blocks) -> None:
    model.load(
        name,
        block.bits,
        block.codes,
        block.scales,
        block.zeros,
        block.block_groups,
        block.order,
        block.steps,
        block.levels,
    )


def _layer(name: str) -> int:
    """Return the layer of a weight, -1 outside of layers: a layer is complete before the next."""
    stem, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    return int(number) if stem == "layers" and number.isdecimal() else -1


def _beside(name: str, weights: Mapping[str, Linear | Floats]) -> list[str]:
    """Return the weights that are multiplied together with `name`, itself included."""
    stem, _, part = name.rpartition(".")
    fused = _FUSED.get(part)
    if not stem.startswith("layers.") or fused is None:
        return [name]
    names = [f"{stem}.{other}" for other, into in _FUSED.items() if into == fused]
    return [other for other in names if other in weights]


def _read(weights: Mapping[str, Linear | Floats], name: str) -> Weight:
    if isinstance(weights, Weights):
        return weights.stored(name)
    weight = weights[name]
    if isinstance(weight, Linear):
        return weight
    array = np.asarray(weight, np.float32)
    return Dense(array) if array.ndim == 2 else array


def _floats(weight: Weight) -> tuple[NDArray[np.generic], bool]:
    """Return a weight as float32, float16 or the bits of bfloat16; whether it shows a file."""
    if not isinstance(weight, Dense | Stored):
        return to_dense(weight), False
    values = np.require(weight.values, requirements="A")
    return values, is_mapped(values)


def _same_order(one: NDArray[np.int32] | None, other: NDArray[np.int32] | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one, other)


def _plan(matrix: Linear, in_bytes: bool) -> tuple[str, Blocks | Rows | None]:
    """Return the smallest format that keeps a matrix as it is, and the matrix as it takes it.

    That is None where the matrix is given as floats or as a file has it.
    """
    if isinstance(matrix, Dense):
        return FLOATS[matrix.dtype], None
    if isinstance(matrix, BlockQuantized) and matrix.format in GGUF_FORMATS:
        return matrix.format, None
    block = Blocks.of(matrix)
    every = tuple(name for name in BITS if name not in ROW_FORMATS)
    for names in (GROUP_FORMATS + SPARSE_FORMATS, every) if in_bytes else (every,):
        name = block.kept_in(names) if block else None
        if name is not None:
            return name, block
    rows = Rows.of(matrix)
    return (_floats_of(matrix), None) if rows is None else (rows.format, rows)


def _floats_of(matrix: Linear) -> str:
    """Return the narrowest format of floats that holds the values of a matrix."""
    # Zeros fit every type: of a sparse matrix only the kept values matter.
    values = widen(matrix.values, matrix.dtype) if isinstance(matrix, Sparse) else matrix.dense()
    for kind in ("BF16", "F16"):
        with suppress(ModelError):
            narrow(values, kind)
            return FLOATS[kind]
    return "fp32"
