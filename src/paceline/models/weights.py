"""The weights of a checkpoint under canonical names, read when they are used."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.errors import ModelError
from paceline.models.config import ModelConfig
from paceline.models.family import Family
from paceline.models.formats.gguf import GGUFFile, GGUFTensor
from paceline.models.formats.mapped import free_pages
from paceline.models.formats.packed import FileTensor, Packed, Packing
from paceline.models.formats.safetensors import Stored, open_tensors
from paceline.models.formats.shared_layers import SHARED_MATRICES, share_places
from paceline.models.formats.stored_forms import StoredForms
from paceline.models.nested import NestedSizes, Width, choose_blocks
from paceline.models.tensor_names import Place, Shape, places
from paceline.models.tensors import (
    BlockQuantized,
    Dense,
    Linear,
    LowRank,
    Nested,
    Sum,
    nested_forms,
    to_dense,
    widen,
)

_READABLE = ("F32", "F16", "BF16")
_GGUF_FLOATS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
# Bits of the exponent: all set in what is infinite or no number.
_EXPONENTS = {"BF16": 0x7F80, "F16": 0x7C00}


class Weights(Mapping[str, Linear | Floats]):
    """Canonical name -> weight: a matrix [out, in] as it is stored, a vector as float32.

    Names and shapes were checked when the checkpoint was opened. Values are checked when a weight
    is first read: a NaN or an infinity is a `ModelError`. Arrays are read-only views into the
    mapped file where it holds them in this order, copies otherwise; nothing is kept but one packed
    matrix that several are parts of.

    Args:
        path: the checkpoint, a folder or a file.
        tensors: what its files hold, without prefixes.
        places: where each canonical tensor lies.
        blocks: how many blocks of nested matrices are read, by the names of their tensors; all of
            those that are not named.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, FileTensor],
        places: Mapping[str, Place],
        blocks: Mapping[str, int] | None = None,
    ) -> None:
        self.path = path
        self._tensors = tensors
        self._places = places
        self._blocks = dict(blocks or {})
        self._finite: set[str] = set()
        self._last: tuple[str, Linear] | None = None

    def __getitem__(self, name: str) -> Linear | Floats:
        weight = self.stored(name)
        if name not in self._finite:
            self._check_finite(name, weight)
        return (
            weight if isinstance(weight, Linear) else to_dense(widen(weight.values, weight.dtype))
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def dense(self, name: str) -> Floats:
        """Return a weight as float32, C-contiguous, its values checked."""
        return to_dense(self[name])

    def to_arrays(self) -> dict[str, Floats]:
        """Return every weight as float32, all in memory at once."""
        return {name: self.dense(name) for name in self}

    def stored(self, name: str) -> Linear | Stored:
        """Return a matrix or a vector as the file holds it, floating-point values unchecked.

        Raises:
            ModelError: a packed matrix is inconsistent.
        """
        place = self._places[name]
        if place.base is not None:
            base = self._at(place.base)
            assert isinstance(base, Linear), "only matrices are shared"
            return Sum((base, self._term(place)))
        return self._at(place)

    def shared_with(self, name: str) -> str | None:
        """Return the first layer's matrix that another layer's is, but for a product of low rank.

        None where the matrix is the layer's own, or is no matrix of a layer.
        """
        key = _key(name, self._places[name])
        first = None if key is None else self._owners[key]
        return None if first == name else first

    def shared_term(self, name: str) -> LowRank | None:
        """Return the product of low rank that is added to a matrix shared with another layer."""
        place = self._places[name]
        return None if place.base is None else self._term(place)

    def _term(self, place: Place) -> LowRank:
        term = self._at(place)
        if not isinstance(term, LowRank):
            raise ModelError(f"tensor {place.tensor} of {self.path} is no product of two matrices")
        return term

    @cached_property
    def _owners(self) -> dict[tuple[str, str], str]:
        """The first matrix of those that several layers share, by its part and place."""
        owners: dict[tuple[str, str], str] = {}
        for name in sorted(self._places, key=_layer):
            if (key := _key(name, self._places[name])) is not None:
                owners.setdefault(key, name)
        return owners

    def _at(self, place: Place) -> Linear | Stored:
        """Return what lies at a place, without what it is added to."""
        tensor = self._tensors[place.tensor]
        if isinstance(tensor, Stored):
            values = part_rows(place, tensor.values.T if place.turned else tensor.values)
            if values.ndim == 2:
                return Dense(values, tensor.dtype)
            return Stored(tensor.dtype, values)
        if place.groups is None and place.rows is None and place.paired is None:
            return self._read(place.tensor, tensor)
        last = self._last
        if last is None or last[0] != place.tensor:
            self._last = last = (place.tensor, self._read(place.tensor, tensor))
        matrix = last[1]
        return matrix.rows(part_rows(place, np.arange(matrix.shape[0])))

    def _read(self, name: str, tensor: Packed | BlockQuantized) -> Linear:
        try:
            return self._matrix(name, tensor)
        except ModelError as error:
            raise ModelError(f"tensor {name} of {self.path}: {error}") from None

    def free_pages(self) -> None:
        """Take what was read of the files out of memory; it is read again where it is used."""
        held = self._tensors.values()
        stored = (each.values for each in held if isinstance(each, Stored))
        free_pages((*stored, *(each.data for each in held if isinstance(each, BlockQuantized))))

    def shape(self, name: str) -> Shape:
        """Return the shape of a weight, a matrix's as [out, in]; nothing is read."""
        return self._places[name].shape

    def float_type(self, name: str) -> str | None:
        """Return `F32`, `F16` or `BF16` for floating-point numbers, else None; nothing is read."""
        kind = self._tensors[self._places[name].tensor].format.upper()
        return kind if kind in _READABLE else None

    def nbytes(self) -> int:
        """Return the bytes of all weights as they are stored; each part that is shared once."""
        total = 0
        places = self._places.values()
        bases = {place.base.tensor for place in places if place.base is not None}
        for tensor in bases | {place.tensor for place in places}:
            stored = self._tensors[tensor]
            if isinstance(stored, Stored):
                total += stored.values.nbytes
            else:
                total += self._matrix(tensor, stored).nbytes
        return total

    @property
    def cut(self) -> str:
        """Which blocks of nested matrices are read, as text; empty where all are."""
        return ",".join(f"{name}={count}" for name, count in sorted(self._blocks.items()))

    def fit(self, memory: int | Width) -> Weights:
        """Return the weights with as many blocks of nested matrices as fit.

        Args:
            memory: bytes of all weights, or bits of the codes of each nested matrix.

        Raises:
            ModelError: no matrix is nested, or the smallest form does not fit.
        """
        nested = {
            tensor: matrix
            for tensor, stored in self._tensors.items()
            if isinstance(stored, Packed) and stored.format in nested_forms()
            if isinstance(matrix := stored.read(), Nested)
        }
        if not nested:
            raise ModelError(
                f"{self.path} has no blocks that could be left out to fit a memory; compress the "
                "original with the recipe bitstack, any_precision or llm_qfa, or leave the memory "
                "out"
            )
        if isinstance(memory, Width):
            blocks = {name: self._blocks_of(matrix, memory) for name, matrix in nested.items()}
        else:
            blocks = self._fitting(nested, memory)
        left_out = {name: n for name, n in blocks.items() if n < len(nested[name].losses)}
        return Weights(self.path, self._tensors, self._places, left_out)

    def _blocks_of(self, matrix: Nested, width: Width) -> int:
        """Return how many blocks of a matrix make codes of a width."""
        if not matrix.widths:
            raise ModelError(
                f"the blocks of {self.path} are no bits of codes; give the memory in bytes, e.g. "
                "80MB"
            )
        if width.bits not in matrix.widths:
            raise ModelError(
                f"{self.path} is loaded with {matrix.widths[0]} to {matrix.widths[-1]} bits, not "
                f"{width.bits}"
            )
        return matrix.widths.index(width.bits) + 1

    def _fitting(self, nested: Mapping[str, Nested], memory: int) -> dict[str, int]:
        """Return how many blocks of each nested matrix fit into `memory` bytes."""
        whole = Weights(self.path, self._tensors, self._places).nbytes()
        rest = whole - sum(matrix.sizes[-1] for matrix in nested.values())
        sizes = {
            name: NestedSizes(matrix.sizes, matrix.losses.tolist())
            for name, matrix in nested.items()
        }
        blocks = choose_blocks(sizes, memory - rest)
        if blocks is None:
            least = rest + sum(each.sizes[0] for each in sizes.values())
            raise ModelError(
                f"{self.path} takes at least {least} bytes, more than the {memory} of the memory; "
                "give more, or compress embedding and head, too (--head)"
            )
        return blocks

    def renamed(self, names: Mapping[str, str]) -> Weights:
        """Return some of the weights under other names: new name -> name here."""
        placed = {name: self._places[old] for name, old in names.items()}
        return Weights(self.path, self._tensors, placed, self._blocks)

    def formats(self) -> tuple[str, ...]:
        """Return the formats in use, e.g. `("bf16",)` or `("bf16", "int8")`."""
        return tuple(sorted({tensor.format for tensor in self._tensors.values()}))

    def _matrix(self, tensor: str, stored: Packed | BlockQuantized) -> Linear:
        """Return a matrix of the files, without the blocks that are left out."""
        matrix = stored.read() if isinstance(stored, Packed) else stored
        if not isinstance(matrix, Nested):
            return matrix
        return matrix.first(self._blocks.get(tensor, len(matrix.losses)))

    def _check_finite(self, name: str, weight: Linear | Stored) -> None:
        if isinstance(weight, BlockQuantized):
            finite = weight.is_finite()
        elif isinstance(weight, Dense | Stored):
            finite = _is_finite(weight.values, weight.dtype)
        else:
            finite = True  # checked when it was built
        if not finite:
            raise ModelError(
                f"tensor {self._places[name].tensor} of {self.path} holds NaN or infinite values"
            )
        self._finite.add(name)


def _layer(name: str) -> int:
    """Return the layer of a weight, -1 outside of layers."""
    return int(name.split(".", 2)[1]) if name.startswith("layers.") else -1


def _key(name: str, place: Place) -> tuple[str, str] | None:
    """Return what matrices that layers share have in common; None for what is no such matrix."""
    part = name.rpartition(".")[2]
    if part not in SHARED_MATRICES or not name.startswith("layers."):
        return None
    return part, repr(place.base or place)  # slices have no hash before Python 3.12


def part_rows(place: Place, values: NDArray[Any]) -> NDArray[Any]:
    """Return the rows of a stored tensor that belong to a canonical one."""
    if place.groups is not None:
        count, size, heads = place.groups
        grouped = values.reshape(count, size, -1, *values.shape[1:])
        return grouped[:, heads].reshape(-1, *values.shape[1:])
    if place.rows is not None:
        values = values[place.rows]
    return values if place.paired is None else _unpair(values, *place.paired)


def _unpair(values: NDArray[Any], head: int, rotated: int) -> NDArray[Any]:
    """Return rows in rotary halves (i turns with i + r / 2) that lie in pairs (2 i with 2 i + 1).

    Args:
        values: [heads * head, ...].
        head: rows of a head.
        rotated: how many of them are rotated, from the first on.
    """
    heads = values.reshape(-1, head, *values.shape[1:])
    pairs = heads[:, :rotated].reshape(-1, rotated // 2, 2, *values.shape[1:])
    halves = pairs.swapaxes(1, 2).reshape(-1, rotated, *values.shape[1:])
    return np.concatenate((halves, heads[:, rotated:]), axis=1).reshape(values.shape)


def _is_finite(values: NDArray[Any], dtype: str) -> bool:
    if dtype in _EXPONENTS:
        bits = np.uint16(_EXPONENTS[dtype])
        return not bool(((values.view(np.uint16) & bits) == bits).any())
    # A finite sum has finite terms, and summing is one pass without a temporary; only a sum
    # that overflowed needs the slower look at every value.
    with np.errstate(all="ignore"):
        return bool(np.isfinite(values.sum()) or np.isfinite(values).all())


def open_weights(
    folder: Path,
    config: ModelConfig,
    family: Family,
    biased: frozenset[str],
    packing: Packing | None = None,
) -> tuple[ModelConfig, Weights]:
    """Return the weights of `folder`, every name and shape checked against the config.

    Args:
        folder: holds the files.
        config: as config.json says.
        family: knows where tensors lie.
        biased: canonical linear maps that have a bias.
        packing: the layout of packed matrices, where config.json speaks of one.

    Returns:
        the config, whose `tied` says what the files hold, and the weights.

    Raises:
        ModelError: a tensor is missing, unexpected, or of another shape.
    """
    files = open_tensors(folder)
    tensors = packing.collect(folder, files) if packing else files
    if isinstance(packing, StoredForms):
        named = {
            name: Place(name, place.shape, place.shape)
            for name, place in places(config, family, biased).items()
        }
        named = share_places(folder, named, tensors, packing.shared_layers)
        return _find(folder, dict(tensors), named, config, "config.json")
    return _place(folder, tensors, config, family, biased, "config.json")


def open_gguf_weights(
    file: GGUFFile, config: ModelConfig, family: Family, biased: frozenset[str]
) -> tuple[ModelConfig, Weights]:
    """Return the weights of a GGUF file; see `open_weights`."""
    tensors = {name: _file_tensor(tensor) for name, tensor in file.tensors.items()}
    return _place(file.path, tensors, config, family, biased, "metadata")


def _file_tensor(tensor: GGUFTensor) -> Stored | BlockQuantized:
    shape = tensor.shape
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    dtype = _GGUF_FLOATS.get(tensor.type)
    if dtype is None:
        return BlockQuantized(tensor.type, tensor.data, shape[-1])
    return Stored(tensor.type, tensor.data.view(dtype).reshape(shape))


def _place(
    path: Path,
    tensors: Mapping[str, FileTensor],
    config: ModelConfig,
    family: Family,
    biased: frozenset[str],
    settings: str,
) -> tuple[ModelConfig, Weights]:
    """Find the tensors of a model among those of its files; `settings` is named in errors."""
    held = _strip(path, tensors, family)
    return _find(path, held, places(config, family, biased), config, settings)


def _find(
    path: Path,
    held: dict[str, FileTensor],
    wanted: dict[str, Place],
    config: ModelConfig,
    settings: str,
) -> tuple[ModelConfig, Weights]:
    """Check that the tensors of files are those that a model has."""
    if config.tied:
        config = replace(config, tied=_tie(held, wanted))
    _check(path, held, wanted, settings)
    return config, Weights(path, held, wanted)


def _strip(path: Path, tensors: Mapping[str, FileTensor], family: Family) -> dict[str, FileTensor]:
    """Return the tensors without their prefixes and without what is no weight."""
    stripped: dict[str, FileTensor] = {}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in family.prefixes if name.startswith(prefix)), "")
        bare = name[len(prefix) :]
        bare = family.aliases.get(bare, bare)
        if re.search(family.skipped, bare):
            continue
        if bare in stripped:
            raise ModelError(f"{path} holds tensor {bare!r:.80} twice, with and without a prefix")
        stripped[bare] = tensor
    return stripped


def _tie(tensors: dict[str, FileTensor], wanted: dict[str, Place]) -> bool:
    """Leave one of embedding and head where the config ties them; False if they differ."""
    embed, head = wanted["embed"].tensor, wanted["head"].tensor
    if head in tensors:
        if embed not in tensors:
            tensors[embed] = tensors[head]
        elif not _same(tensors[embed], tensors[head]):
            return False
        del tensors[head]
    del wanted["head"]
    return True


def _same(one: FileTensor, other: FileTensor) -> bool:
    if isinstance(one, Stored) and isinstance(other, Stored):
        return np.array_equal(one.values, other.values)
    if isinstance(one, BlockQuantized) and isinstance(other, BlockQuantized):
        return one.type == other.type and np.array_equal(one.data, other.data)
    if isinstance(one, Packed) and isinstance(other, Packed):
        return np.array_equal(one.read().dense(), other.read().dense())
    return False


def _check(
    path: Path, tensors: Mapping[str, FileTensor], wanted: Mapping[str, Place], settings: str
) -> None:
    shapes = {place.tensor: place.stored for place in wanted.values()}
    for place in wanted.values():  # packed matrices are [out, in] in every family
        if place.turned and isinstance(tensors.get(place.tensor), Packed):
            shapes[place.tensor] = place.stored[::-1]
    for name, shape in shapes.items():
        if name not in tensors:
            raise ModelError(f"{path} lacks tensor {name}, which its {settings} asks for")
        tensor = tensors[name]
        if isinstance(tensor, Stored) and tensor.dtype not in _READABLE:
            raise ModelError(
                f"tensor {name} of {path} is stored as {tensor.dtype}, expected "
                f"{', '.join(_READABLE)}; this quantised or packed layout is not supported"
            )
        if tensor.shape != shape:
            raise ModelError(
                f"tensor {name} of {path} has shape {_show(tensor.shape)}, expected "
                f"{_show(shape)} by its {settings}"
            )
    for name in tensors:
        if name not in shapes:
            raise ModelError(
                f"{path} holds tensor {name!r:.80}, which its {settings} does not account for"
            )


def _show(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "of a single number"
