"""Weights of 2 to 8 bits as compressed-tensors stores them.

In its format `pack-quantized` a linear map W [out, in] is `weight_packed` int32 [out, words], codes
of neighbouring inputs in a word from the lowest bit up, none across two words; `weight_scale`
[out, groups], [out, 1] or one number; `weight_shape`, out and in; `weight_zero_point` where the
codes are asymmetric, int32 [words, groups] packed along the outputs, or int8 [out, groups] less
half the range; and `weight_g_idx` int32 [in], the group of each input, where these are not in
order.
W = (code - zero) * scale. In `int-quantized` the codes are `weight` int8 [out, in] less half the
range, and so are zero points. `sparse_24.py` has what it stored of 2:4 sparse maps. llm-compressor,
vLLM and transformers write and read these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.errors import ModelError
from paceline.models.fields import Fields
from paceline.models.formats.bits import pack_fields, unpack_fields
from paceline.models.formats.packed import (
    FLOATS,
    FileTensor,
    Packed,
    check_part,
    plain_order,
    plain_zeros,
    scale_rows,
    take_parts,
)
from paceline.models.formats.safetensors import Stored
from paceline.models.formats.sparse_24 import FORMAT as SPARSE
from paceline.models.formats.sparse_24 import collect_sparse
from paceline.models.tensors import Grouped, narrow, widen

BITS = tuple(range(2, 9))
FORMATS = (PACKED, INTEGERS) = ("pack-quantized", "int-quantized")
_PACKED, _SCALE, _SHAPE, _ZERO, _ORDER = "_packed", "_scale", "_shape", "_zero_point", "_g_idx"
_WHERE = "quantization_config in config.json"


@dataclass(frozen=True)
class CompressedTensorsLayout:
    """The settings of a checkpoint.

    Attributes:
        widths: bits of its packed matrices; which of them a matrix has tells its shape.
        symmetric: whether there may be matrices without zero points.
        sparse: whether there are sparse matrices.
        packed: whether there are packed ones.
    """

    widths: tuple[int, ...]
    symmetric: bool = True
    sparse: bool = False
    packed: bool = True

    @classmethod
    def of(cls, scheme: Mapping[str, Any]) -> CompressedTensorsLayout:
        """Read a `quantization_config`.

        Raises:
            ModelError: a setting is missing or not supported.
        """
        groups = scheme.get("config_groups")
        sparsity = scheme.get("sparsity_config")
        if isinstance(sparsity, dict) and sparsity.get("format") == SPARSE and not groups:
            return cls((), sparse=True)
        stated = scheme.get("format")
        if not isinstance(groups, dict) or not groups or not _known(stated, groups):
            raise ModelError(
                f"{_WHERE} has the format {stated!r:.40}, expected pack-quantized or int-quantized "
                "with config_groups: integers of 2 to 8 bits, weights only"
            )
        if scheme.get("kv_cache_scheme") is not None:
            raise ModelError(f"{_WHERE} quantises the cache, too; choose that with --kv-format")
        widths = {_bits(name, group) for name, group in groups.items()}
        plain = any(group["weights"].get("symmetric", True) for group in groups.values())
        return cls(tuple(sorted(widths)), plain, packed=stated != INTEGERS)

    def collect(self, folder: object, tensors: Mapping[str, Stored]) -> dict[str, FileTensor]:
        """Return the tensors with each packed matrix as one; see `Packing.collect`."""
        rest: dict[str, FileTensor] = dict(tensors)
        names = (_PACKED, _SCALE, _SHAPE, f"{_ZERO}?" if self.symmetric else _ZERO, f"{_ORDER}?")
        for name in [name for name in tensors if name.endswith(_PACKED)]:
            if not self.packed:
                raise ModelError(
                    f"{_WHERE} has the format {INTEGERS} and {folder} holds {name!r:.80}, expected "
                    f"{PACKED}; download it again"
                )
            weight = name.removesuffix(_PACKED)
            parts = take_parts(folder, rest, weight, names)
            rest[weight] = self._matrix(f"{weight!r:.80} of {folder}", parts)
        for name in [name for name in rest if name.endswith(_SCALE)]:
            weight = name.removesuffix(_SCALE)
            codes = rest.get(weight)
            if isinstance(codes, Stored) and codes.dtype == "I8":
                parts = take_parts(folder, rest, weight, ("", _SCALE, f"{_ZERO}?"))
                rest[weight] = _integers(f"{weight!r:.80} of {folder}", parts)
        if self.sparse:
            collect_sparse(folder, rest)
        return rest

    def _matrix(self, what: str, parts: Mapping[str, Stored]) -> Packed:
        rows, inputs = _shape(what, parts[_SHAPE])
        words = parts[_PACKED]
        fitting = [bits for bits in self.widths if words.shape == (rows, _words(inputs, bits))]
        if words.dtype != "I32" or not fitting:
            raise ModelError(
                f"{what} is packed as {words.dtype} {list(words.shape)}, which is no I32 for "
                f"{rows}x{inputs} codes of {' or '.join(map(str, self.widths))} bits"
            )
        if len(fitting) > 1:
            raise ModelError(f"{what} may have {fitting} bits; its shape does not tell which")
        [bits] = fitting
        scale = parts[_SCALE]
        scales = scale.values.reshape(1, 1) if scale.values.size == 1 else scale.values
        order = parts.get(_ORDER)
        if order is not None:
            check_part(f"{what}: g_idx", order, ("I32",), (inputs,))
        group = _group(what, scale, scales, rows, inputs)
        groups = scales.shape[1]
        zeros = parts.get(_ZERO)
        if zeros is not None and zeros.dtype != "I8":
            check_part(f"{what}: zero_point", zeros, ("I32",), (_words(rows, bits), groups))
        elif zeros is not None and zeros.values.size != 1:
            check_part(f"{what}: zero_point", zeros, ("I8",), (rows, groups))

        def read() -> Grouped:
            wide = np.broadcast_to(scale_rows(scales, scale.dtype, turned=False), (rows, groups))
            return Grouped(
                bits,
                np.ascontiguousarray(unpack_fields(words.values, bits)[:, :inputs]),
                np.ascontiguousarray(wide),
                group,
                _zeros(zeros, bits, rows, groups),
                g_idx=None if order is None else plain_order(order.values, group, inputs),
                scale_type=scale.dtype,
            )

        return Packed((rows, inputs), f"int{bits}", read)


def _integers(what: str, parts: Mapping[str, Stored]) -> Packed:
    """Return a matrix of whole bytes."""
    codes, scale, zeros = parts[""], parts[_SCALE], parts.get(_ZERO)
    if codes.values.ndim != 2 or not codes.values.size:
        raise ModelError(f"{what} has the shape {list(codes.shape)}, expected two axes")
    rows, inputs = codes.values.shape
    scales = scale.values.reshape(1, 1) if scale.values.size == 1 else scale.values
    group = _group(what, scale, scales, rows, inputs)
    groups = scales.shape[1]
    if zeros is not None and (zeros.dtype != "I8" or zeros.values.size != 1):
        check_part(f"{what}: zero_point", zeros, ("I8",), (rows, groups))

    def read() -> Grouped:
        wide = np.broadcast_to(scale_rows(scales, scale.dtype, turned=False), (rows, groups))
        return Grouped(
            8,
            codes.values.view(np.uint8) ^ np.uint8(128),
            np.ascontiguousarray(wide),
            group,
            _zeros(zeros, 8, rows, groups),
            scale_type=scale.dtype,
        )

    return Packed((rows, inputs), "int8", read)


def _known(stated: object, groups: Mapping[str, Any]) -> bool:
    """Return whether matrices are stored in a format that is read here, maybe each group's own."""
    if stated != "mixed-precision":
        return stated in FORMATS
    return all(isinstance(each, dict) and each.get("format") in FORMATS for each in groups.values())


def _bits(name: str, group: Any) -> int:
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise ModelError(f"{_WHERE} has no weights in its group {name!r:.40}")
    for part in ("input_activations", "output_activations"):
        if group.get(part) is not None:
            raise ModelError(f"{_WHERE} quantises {part}; only weights can be packed")
    fields = Fields(group["weights"], f"{_WHERE}, group {name!r:.40}")
    bits = fields.integer("num_bits")
    supported = {"num_bits": BITS, "type": ("int",), "dynamic": (False,)}
    for key, known in supported.items():
        if key in fields and fields.values[key] not in known:
            raise fields.fail(key, " or ".join(map(str, known)))
    return bits


def _words(count: int, bits: int) -> int:
    """Return the words of `count` codes, of which none lies across two."""
    return -(-count // (32 // bits))


def _shape(what: str, size: Stored) -> tuple[int, int]:
    if size.values.shape != (2,) or size.dtype not in ("I64", "I32") or (size.values < 1).any():
        raise ModelError(f"{what} has no weight_shape of two numbers; download it again")
    rows, columns = map(int, size.values)
    return rows, columns


def _group(what: str, scale: Stored, scales: NDArray[Any], rows: int, inputs: int) -> int:
    """Return the inputs that share a scale."""
    fits = scales.ndim == 2 and len(scales) in (1, rows) and scales.size > 0
    if scale.dtype not in FLOATS or not fits or inputs % scales.shape[1]:
        raise ModelError(
            f"{what} has scales {scale.dtype} {list(scale.shape)}, expected a row of them "
            f"for each of {rows} outputs, for equal groups of the {inputs} inputs"
        )
    return inputs // int(scales.shape[1])


def _zeros(zeros: Stored | None, bits: int, rows: int, groups: int) -> NDArray[np.uint16] | None:
    if zeros is None:
        return None
    if zeros.dtype == "I8":
        held = zeros.values.astype(np.int32) + (1 << (bits - 1))
        if (held < 0).any():
            raise ModelError("zero points are below the range of the codes")
        one = held.reshape(1, 1) if held.size == 1 else held
        points: NDArray[Any] = np.broadcast_to(one, (rows, groups))
    else:
        points = unpack_fields(np.ascontiguousarray(zeros.values.T), bits)[:, :rows].T
    return plain_zeros(np.ascontiguousarray(points.astype(np.uint16)), bits)


def save(matrix: Grouped) -> dict[str, NDArray[Any]]:
    """Return what follows `weight` in a name -> tensor, for a matrix in `pack-quantized`.

    Raises:
        ModelError: it has minima, which this layout cannot hold, or zero points beyond its range.
    """
    _check_zeros(matrix)
    parts: dict[str, NDArray[Any]] = {
        _PACKED: pack_fields(matrix.codes, matrix.bits),
        _SCALE: narrow(matrix.scales, matrix.scale_type),
        _SHAPE: np.array(matrix.shape, np.int64),
    }
    if matrix.zeros is not None:
        turned = np.ascontiguousarray(matrix.zeros.T.astype(np.uint8))
        parts[_ZERO] = np.ascontiguousarray(pack_fields(turned, matrix.bits).T)
    if matrix.g_idx is not None:
        parts[_ORDER] = matrix.g_idx
    return parts


def save_integers(matrix: Grouped) -> dict[str, NDArray[Any]]:
    """Return what follows `weight` in a name -> tensor, for 8 bits in `int-quantized`.

    Raises:
        ModelError: other bits, minima, or groups in an order of their own.
    """
    _check_zeros(matrix)
    if matrix.bits != 8 or matrix.g_idx is not None:
        raise ModelError("int-quantized holds integers of 8 bits, with groups in order")
    parts: dict[str, NDArray[Any]] = {
        "": (matrix.codes ^ np.uint8(128)).view(np.int8),
        _SCALE: narrow(matrix.scales, matrix.scale_type),
    }
    if matrix.zeros is not None:
        parts[_ZERO] = (matrix.zeros.astype(np.int16) - np.int16(128)).astype(np.int8)
    return parts


def _check_zeros(matrix: Grouped) -> None:
    if matrix.minima is not None or (
        matrix.zeros is not None and matrix.zeros.max() >> matrix.bits
    ):
        raise ModelError("compressed-tensors packs zero points below 2 ** bits, and no minima")


def quantize(matrix: Floats, bits: int = 8, group: int = 32) -> Grouped:
    """Round a float32 matrix [out, in] to symmetric integers with a scale for `group` inputs.

    Scales are bfloat16 numbers, the one that fits the largest weight of a group: what was rounded
    once is kept when it is rounded again.

    Raises:
        ModelError: groups do not divide the inputs, or not into whole words.
    """
    rows, columns = matrix.shape
    if columns % group or columns * bits % 32:
        raise ModelError(f"{columns} inputs cannot be packed in groups of {group} at {bits} bits")
    largest = (1 << (bits - 1)) - 1
    groups = matrix.reshape(rows, -1, group)
    upper = np.abs(groups).max(-1) / np.float32(largest)
    rounded = ((upper.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)
    scales = widen(rounded, "BF16")
    safe = np.where(scales == 0, np.float32(1), scales)
    numbers = np.clip(np.rint(groups / safe[:, :, None]), -largest, largest)
    codes = (numbers.reshape(rows, -1) + (largest + 1)).astype(np.uint8)
    return Grouped(bits, codes, scales, group, scale_type="BF16")


def pack(matrix: Floats, bits: int = 8, group: int = 32) -> dict[str, NDArray[Any]]:
    """Return what follows `weight` in a name -> tensor, for a matrix rounded by `quantize`."""
    return save(quantize(matrix, bits, group))


def scheme(bits: int = 8, group: int = 32, symmetric: bool = True) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint with packed linear maps, its head not."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": group,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
