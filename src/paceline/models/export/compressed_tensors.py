"""Write a model whose matrices are integers, or 2:4 sparse, as compressed-tensors stores them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.errors import MethodError, ModelError, unknown
from paceline.method_spec import parse_spec
from paceline.models.export.assembly import Assembled, as_matrix, form_name, stored_rows
from paceline.models.export.safetensors import FORMATS as DTYPES
from paceline.models.export.safetensors import SafetensorsExport
from paceline.models.formats import compressed_tensors
from paceline.models.formats.compressed_tensors import FORMATS, INTEGERS, PACKED
from paceline.models.formats.gguf_quantize import quantize
from paceline.models.formats.sparse_24 import PATTERN, save_sparse, sparsity_config
from paceline.models.formats.writer import Pending, type_name
from paceline.models.model import Model
from paceline.models.tensors import Dense, Grouped, Linear, Sparse, widen

NAME = "compressed-tensors"
_WIDTHS = (4, 8)  # bits that other programs multiply; fewer become the next of them
_STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
Parts = dict[str, tuple[str, NDArray[Any]]]


@dataclass(frozen=True)
class _Scheme:
    """What tells the integers of matrices apart in config.json."""

    bits: int
    group: int | None  # None: one scale a row
    symmetric: bool

    def arguments(self) -> dict[str, Any]:
        """Return the entry `weights` of a group in config.json."""
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "channel" if self.group is None else "group",
            "group_size": self.group,
            "dynamic": False,
        }


class CompressedTensorsExport(SafetensorsExport):
    """A model that is ready to be written; see `SafetensorsExport`.

    Integers of up to 4 bits are stored in 4, others in 8, by group or by row; other matrices as
    floating-point numbers. Where a pruner kept two of every four inputs and nothing is quantised,
    the kept values and a bitmap are stored.

    Args:
        model: the source.
        text: `compressed-tensors`, with `format` (pack-quantized or int-quantized) and `dtype` of
            scales and other numbers, e.g. `compressed-tensors:dtype=bf16`.

    Raises:
        ModelError: a matrix has no form there, or no matrix has one; which, and what to do.
        MethodError: an unknown setting.
    """

    def __init__(self, model: Model, text: str = NAME) -> None:
        settings = _parse(text)
        self._format = settings.get("format", PACKED)
        super().__init__(model, settings.get("dtype", "auto"))
        self.notes = [note for note in self.notes if not note.startswith("quantised")]
        self._rounded = False
        self._widths: Counter[tuple[int, int]] = Counter()  # (bits of the source, bits stored)
        self._schemes: dict[str, _Scheme | None] = {}  # by module; None is sparse
        self._shapes: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
        self._last: tuple[str, Parts] = ("", {})
        for name, tensor in self._tensors.items():
            if tensor.is_matrix and not _is_embedding(tensor):
                self._plan(name, tensor)
        self._check_schemes()
        self._settings["quantization_config"] = self._config()
        self._describe()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, for a progress bar."""
        size = np.dtype(_STORED[self.dtype]).itemsize
        total = 0
        for name, tensor in self._tensors.items():
            if name in self._shapes:
                total += sum(
                    int(np.prod(shape)) * np.dtype(kind).itemsize
                    for kind, shape in self._shapes[name].values()
                )
            else:
                total += size * int(np.prod(tensor.shape))
        return total

    def _plan(self, name: str, tensor: Assembled) -> None:
        """Decide in which form a matrix is stored.

        Raises:
            ModelError: there is none.
        """
        kinds = {type(as_matrix(self._model.weights[part])) for part in tensor.names}
        if kinds == {Dense}:
            return
        parts = self._parts(name, tensor)
        self._last = ("", {})  # decided for all before anything is kept
        self._shapes[name] = {
            full: (values.dtype.newbyteorder("<").str, values.shape)
            for full, (_, values) in parts.items()
        }

    def _parts(self, name: str, tensor: Assembled) -> Parts:
        """Return the tensors of a matrix by their names in the file."""
        if self._last[0] == name:
            return self._last[1]
        matrix = _join(self._model, tensor)
        if isinstance(matrix, Sparse):
            self._schemes[name] = None
            saved = save_sparse(replace(matrix, values=self._values_of(matrix), dtype=self.dtype))
            module = name.removesuffix("weight")
            parts = {f"{module}{part}": values for part, values in saved.items()}
        else:
            grouped = self._grouped(matrix)
            group = None if grouped.group >= grouped.shape[1] else grouped.group
            self._schemes[name] = _Scheme(grouped.bits, group, grouped.zeros is None)
            packed = self._format == PACKED
            saved = (compressed_tensors.save if packed else compressed_tensors.save_integers)(
                grouped
            )
            parts = {f"{name}{part}": values for part, values in saved.items()}
        typed = {full: (self._kind(values), values) for full, values in parts.items()}
        self._last = (name, typed)
        return typed

    def _grouped(self, matrix: Grouped) -> Grouped:
        """Return integers in 4 or 8 bits, with scales in the type of the checkpoint."""
        bits = next(width for width in _WIDTHS if width >= matrix.bits)
        bits = 8 if self._format == INTEGERS else bits
        self._widths[matrix.bits, bits] += 1
        scales = widen(self._round(matrix.scales), self.dtype)
        codes = matrix.codes
        if matrix.zeros is None and bits > matrix.bits:
            codes = codes + np.uint8((1 << (bits - 1)) - (1 << (matrix.bits - 1)))
        return replace(matrix, bits=bits, codes=codes, scales=scales, scale_type=self.dtype)

    def _values_of(self, matrix: Sparse) -> NDArray[Any]:
        rows = self._round(widen(matrix.values, matrix.dtype)[None])
        return rows.reshape(-1)

    def _round(self, values: NDArray[np.float32]) -> NDArray[Any]:
        """Return numbers in the type of the checkpoint.

        Raises:
            ModelError: it cannot hold them.
        """
        rows = np.ascontiguousarray(values)
        packed = quantize(self.dtype, rows).view(_STORED[self.dtype])
        stored: NDArray[Any] = packed.reshape(values.shape)
        self._rounded |= not np.array_equal(widen(stored, self.dtype), values)
        return stored

    def _kind(self, values: NDArray[Any]) -> str:
        kind = type_name(values.dtype.newbyteorder("<"))
        return "BF16" if kind == "U16" else kind

    def _check_schemes(self) -> None:
        """Refuse a checkpoint without integers, and one that mixes them with sparse matrices."""
        if not self._schemes:
            raise ModelError(
                f"{self._model.name} holds no integers and no 2:4 sparse matrices; compress it "
                "first, e.g. paceline compress MODEL FOLDER --recipe gptq:bits=4,group=32"
            )
        sparse = [name for name, scheme in self._schemes.items() if scheme is None]
        if sparse and len(sparse) < len(self._schemes):
            raise ModelError(
                f"{NAME} holds either integers or sparse matrices, and {sparse[0]} is sparse "
                "beside integers; quantise all matrices, or write numbers with --format bf16"
            )

    def _config(self) -> dict[str, Any]:
        """Return the `quantization_config`."""
        modules = {name: name.removesuffix(".weight") for name in self._schemes}
        plain = [
            name.removesuffix(".weight")
            for name, tensor in self._tensors.items()
            if tensor.is_matrix and name not in modules and not _is_embedding(tensor)
        ]
        if self._model.config.tied:
            plain.append("lm_head")
        common = {"quant_method": NAME, "quantization_status": "compressed", "ignore": plain}
        found: dict[_Scheme, list[str]] = {}
        for name, scheme in self._schemes.items():
            if scheme is None:
                sparsity = sparsity_config(plain)
                return common | {
                    "format": "dense",
                    "config_groups": {},
                    "sparsity_config": sparsity,
                }
            found.setdefault(scheme, []).append(modules[name])
        groups = {
            f"group_{number}": {
                "targets": ["Linear"] if len(found) == 1 else targets,
                "weights": scheme.arguments(),
                "input_activations": None,
                "output_activations": None,
            }
            for number, (scheme, targets) in enumerate(found.items())
        }
        return common | {"format": self._format, "config_groups": groups}

    def _describe(self) -> None:
        """Count the tensors of each form, and note what differs from the source."""
        self.types = Counter(
            _label(self._schemes[name]) if name in self._schemes else self.dtype
            for name in self._tensors
        )
        for (bits, stored), count in sorted(self._widths.items()):
            if bits != stored:
                self.notes.append(f"{count} matrices of {bits} bits are stored in {stored}")
        if self._rounded:
            self.notes.append(f"scales are rounded to {self.dtype}")
        for name, tensor in self._tensors.items():
            if _is_embedding(tensor) and self._model.weights.float_type(tensor.names[0]) is None:
                self.notes.append(f"{name} is quantised and written as {self.dtype} numbers")
        if None in self._schemes.values():
            self.notes.append(
                "compressed-tensors reads 2:4 sparse matrices up to its release 0.14, and Paceline"
            )

    def _pending(self, tick: Callable[[int], None] | None) -> Mapping[str, Pending]:
        pending: dict[str, Pending] = {}
        for name, tensor in self._tensors.items():
            if name not in self._shapes:
                pending[name] = Pending(
                    tensor.shape, partial(self._values, tensor, tick), self.dtype
                )
                continue
            for full, (kind, shape) in self._shapes[name].items():
                dtype = self._kind(np.empty(0, kind))
                pending[full] = Pending(shape, partial(self._part, name, tensor, full, tick), dtype)
        return pending

    def _part(
        self, name: str, tensor: Assembled, full: str, tick: Callable[[int], None] | None
    ) -> NDArray[Any]:
        values = self._parts(name, tensor)[full][1]
        if tick:
            tick(values.nbytes)
        return values


def _parse(text: str) -> Mapping[str, str]:
    """Return the settings of the format's name."""
    spec = parse_spec(text)
    known: Mapping[str, tuple[str, ...]] = {"format": FORMATS, "dtype": DTYPES}
    for key, value in spec.settings.items():
        if key not in known:
            raise MethodError(unknown(f"setting of {NAME}", key, list(known)))
        if value not in known[key]:
            raise MethodError(unknown(f"{key} of {NAME}", value, known[key]))
    return spec.settings


def _is_embedding(tensor: Assembled) -> bool:
    return tensor.names[0] in ("embed", "positions")


def _label(scheme: _Scheme | None) -> str:
    return "2:4 sparse" if scheme is None else f"int{scheme.bits}"


def _join(model: Model, tensor: Assembled) -> Grouped | Sparse:
    """Return the rows of a tensor in the order of the file.

    Raises:
        ModelError: compressed-tensors has no place for their form.
    """
    matrices = {name: as_matrix(model.weights[name]) for name in tensor.names}
    for (name, place), matrix in zip(tensor.parts, matrices.values(), strict=True):
        _check(name, matrix, place.turned)
    parts = list(matrices.values())
    first = parts[0]
    if any(_layout(each) != _layout(first) for each in parts):
        raise ModelError(
            f"{NAME} stores {' and '.join(tensor.names)} in one tensor, and they have different "
            "forms; give them the same recipe, or write numbers with --format bf16"
        )
    order = np.argsort(np.concatenate([stored_rows(place) for _, place in tensor.parts]))
    joined: Grouped | Sparse
    if isinstance(first, Sparse):
        sparse = [each for each in parts if isinstance(each, Sparse)]
        joined = replace(
            first,
            mask=np.concatenate([each.mask for each in sparse]),
            values=np.concatenate([each.values for each in sparse]),
        )
    else:
        joined = _concatenate([each for each in parts if isinstance(each, Grouped)])
    return joined if (order[1:] > order[:-1]).all() else joined.rows(order)


def _concatenate(parts: list[Grouped]) -> Grouped:
    first = parts[0]
    if len(parts) == 1:
        return first
    zeros = None if first.zeros is None else np.concatenate([_zeros(each) for each in parts])
    return replace(
        first,
        codes=np.concatenate([each.codes for each in parts]),
        scales=np.concatenate([each.scales for each in parts]),
        zeros=zeros,
    )


def _zeros(matrix: Grouped) -> NDArray[np.uint16]:
    assert matrix.zeros is not None
    return matrix.zeros


def _layout(matrix: Linear) -> tuple[object, ...]:
    """Return what parts of one tensor have to share."""
    if isinstance(matrix, Grouped):
        return Grouped, matrix.bits, matrix.group, matrix.zeros is None
    return (type(matrix), getattr(matrix, "dtype", None))


def _check(name: str, matrix: Linear, turned: bool) -> None:
    """Refuse a form that compressed-tensors has no place for."""
    why = None
    if turned:
        why = "this family stores it turned round, which is no linear map of transformers"
    elif isinstance(matrix, Sparse):
        groups = matrix.mask.reshape(-1, 4) if matrix.shape[1] % 4 == 0 else matrix.mask
        if groups.shape[1] != PATTERN[1] or (groups.sum(1) != PATTERN[0]).any():
            why = "it takes sparse matrices with two of every four inputs only"
    elif not isinstance(matrix, Grouped):
        why = "it takes integers in groups and 2:4 sparse matrices"
    elif matrix.minima is not None:
        why = "it has zero points and no minima"
    elif matrix.g_idx is not None:
        why = "its readers no longer take groups in an order of their own"
    elif matrix.group < matrix.shape[1] and matrix.shape[1] % matrix.group:
        why = f"groups have to divide the {matrix.shape[1]} inputs"
    elif matrix.zeros is not None and matrix.zeros.max(initial=0) >= 1 << max(4, matrix.bits):
        why = "a zero point lies behind the last code"
    if why:
        raise ModelError(
            f"{NAME} has no place for {name} ({form_name(matrix)}): {why}; take another recipe, or "
            "write numbers with --format bf16"
        )
