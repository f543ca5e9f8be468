"""How weights go into the native engine: kept as they are stored where a format holds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from paceline import _native
from paceline.core import Floats
from paceline.engines.blocks import Blocks
from paceline.engines.formats import (
    BITS,
    GGUF_FORMATS,
    GROUP_FORMATS,
    ROW_FORMATS,
    SPARSE_FORMATS,
    Format,
)
from paceline.engines.low_rank_terms import LowRankTerm, pays, split_term, term_of
from paceline.engines.row_codes import Rows
from paceline.errors import ModelError
from paceline.models.formats.mapped import is_mapped
from paceline.models.formats.safetensors import Stored
from paceline.models.tensors import (
    BlockQuantized,
    Dense,
    Linear,
    Sparse,
    narrow,
    to_dense,
    widen,
)
from paceline.models.weights import Weights

_IN_BYTES = {"int8": "group8", "int4": "group4"}  # the same values, for activations of 8 bits
FLOATS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}  # types in files -> formats
_FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}

Weight = Linear | Stored | Floats


def load_weights(
    model: _native.NativeModel,
    weights: Mapping[str, Linear | Floats],
    chosen: Format | None,
    in_bytes: bool = False,
    share: bool = True,
) -> Format:
    """Put all weights into a model.

    Args:
        model: takes them.
        weights: by canonical name. Those of a checkpoint are read as it holds them.
        chosen: the formats, or None to keep each matrix as it is stored.
        in_bytes: whether they shall be such as can be multiplied with activations of 8 bits.
        share: let layers that share matrices have them in the same memory.

    Returns:
        the formats in use; several of the layers are joined by `+`, the largest part first.

    Raises:
        ModelError, ValueError: a weight does not belong to the model, or cannot be kept.
    """
    sizes: tuple[dict[str, int], dict[str, int]] = ({}, {})  # of the layers; of embedding and head
    done: set[str] = set()
    vectors: list[str] = []
    sharing = SharedWeights(weights, chosen is None)
    for name in sorted(weights, key=_layer):
        if name in done:
            continue
        parts = _beside(name, weights)
        done.update(parts)
        if share and sharing.share(model, parts):
            continue
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
        apart = bool(sharing.apart & matrices.keys())
        if _load_together(model, matrices, form, count, in_bytes, apart):
            sharing.leave(matrices)
    for name in vectors:  # biases last: they lie as the panels of their matrices do
        model.set(name, *_floats(_read(weights, name)))
    names = ["+".join(sorted(each, key=lambda form: -each[form])) for each in sizes]
    return Format(names[0] or names[1], names[1])


def expands(matrix: Linear) -> bool:
    """Return whether the engine holds a matrix as floating-point numbers, not as it is stored."""
    return _split(matrix) is None and _plan(matrix, in_bytes=False)[0] in FLOATS.values()


def _load_together(
    model: _native.NativeModel,
    matrices: Mapping[str, Linear],
    form: str | None,
    count: dict[str, int],
    in_bytes: bool,
    apart: bool,
) -> bool:
    """Load the matrices that one product multiplies with, each in its own format.

    Args:
        model: takes them.
        matrices: by canonical name.
        form: the format of all; None keeps each as it is stored.
        count: number of weights by format, which is added to.
        in_bytes: as for `load_weights`.
        apart: let each lie in a matrix of its own.

    Returns:
        whether low-rank terms are added to any.
    """
    if in_bytes and form is not None:
        form = _IN_BYTES.get(form, form)
    plans: dict[str, tuple[str, Blocks | Rows | None]] = {}
    terms: dict[str, LowRankTerm] = {}
    matrices = dict(matrices)
    for name, matrix in matrices.items() if form is None else ():
        if name.startswith("layers.") and (split := _split(matrix)) is not None:
            matrices[name], terms[name] = split
    for name, matrix in matrices.items():
        plans[name] = (form, None) if form is not None else _plan(matrix, in_bytes)
        if form is not None and (block := Blocks.of(matrix)) and block.fits(form):
            plans[name] = (form, block)
    first, *others = (
        each.order if isinstance(each, Blocks) else None for _, each in plans.values()
    )
    apart = apart or not all(_same_order(first, order) for order in others)
    for name, (kept, packed) in plans.items():
        group = 1 if packed is None else packed.group_in(kept)
        model.set_format(name, kept, apart, group)
        rows, inputs = matrices[name].shape
        count[kept] = count.get(kept, 0) + rows * inputs
    for name, term in terms.items():
        term.add_to(model, name)
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
    for name, term in terms.items():
        load_term(model, name, term)
    return bool(terms)


def load_term(model: _native.NativeModel, name: str, term: LowRankTerm) -> None:
    """Load both factors of a low-rank term that a matrix was told of."""
    _load(model, f"{name}.right", term.right[1])
    _load(model, f"{name}.left", term.left[1])


class SharedWeights:
    """Matrices that several layers of a model share, so that all but the first need no memory.

    Args:
        weights: by canonical name.
        terms: whether products of low rank may be multiplied beside what is shared; otherwise
            layers with such products have matrices of their own.
    """

    def __init__(self, weights: Mapping[str, Linear | Floats], terms: bool) -> None:
        self._weights = weights if isinstance(weights, Weights) else None
        self._terms = terms
        self._alone: set[str] = set()
        self.apart: set[str] = set()  # shared matrices beside which terms are multiplied
        for name in weights if self._weights is not None and terms else ():
            if self._weights is not None and self._weights.shared_term(name) is not None:
                self.apart.add(self._weights.shared_with(name) or name)

    def leave(self, names: Iterable[str]) -> None:
        """Note matrices that cannot be shared, as they have terms themselves."""
        self._alone.update(names)

    def share(self, model: _native.NativeModel, names: Sequence[str]) -> bool:
        """Let matrices that one product multiplies with be those of another layer, if they are.

        Returns:
            whether they are; else they are to be loaded.
        """
        if self._weights is None:
            return False
        sources = [self._weights.shared_with(name) for name in names]
        layers = {None if each is None else _layer(each) for each in sources}
        if None in layers or len(layers) > 1 or self._alone.intersection(map(str, sources)):
            return False
        terms: dict[str, LowRankTerm] = {}
        for name in names:
            product = self._weights.shared_term(name)
            term = None if product is None else term_of(product)
            if product is not None and (term is None or not self._terms):
                return False
            if term is not None:
                terms[name] = term
        for name, term in terms.items():
            term.add_to(model, name)
        model.share(names[0], str(sources[0]))
        for name, term in terms.items():
            load_term(model, name, term)
        return True


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


def _split(matrix: Linear) -> tuple[Linear, LowRankTerm] | None:
    """Return a matrix and a low-rank term that are multiplied apart; None where it is expanded."""
    split = split_term(matrix)
    if split is None:
        return None
    base, term = split
    form, packed = _plan(base, in_bytes=False)
    bits = packed.bits_in(form) if packed is not None else BITS[form]
    return split if form not in FLOATS.values() and pays(bits, term, matrix.shape) else None


def _floats_of(matrix: Linear) -> str:
    """Return the narrowest format of floats that holds the values of a matrix."""
    # Zeros fit every type: of a sparse matrix only the kept values matter.
    values = widen(matrix.values, matrix.dtype) if isinstance(matrix, Sparse) else matrix.dense()
    for kind in ("BF16", "F16"):
        with suppress(ModelError):
            narrow(values, kind)
            return FLOATS[kind]
    return "fp32"
