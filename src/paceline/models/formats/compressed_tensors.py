"""Weights of 8 and 4 bits as compressed-tensors packs them (its format `pack-quantized`).

A linear map W [out, in] is three tensors: `weight_packed` int32, numbers of a row side by side from
the lowest bit up, each with half its range added; `weight_scale` [out, groups], or [out, 1], one
for so many inputs of a row; `weight_shape`. W = number * scale, which float32 holds exactly where
the scales are bfloat16 or float16. llm-compressor, vLLM and transformers write and read it.
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
from paceline.models.formats.safetensors import Stored, to_float32

BITS = (8, 4)
_PACKED, _SCALE, _SHAPE = "_packed", "_scale", "_shape"
_FOREIGN = {"_zero_point": "zero points", "_g_idx": "reordered inputs"}
_SCALES = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A matrix in few bits; `values` unpacks it each time.

    Attributes:
        bits: of a number.
        words: int32 [out, in * bits / 32].
        scales: float32 [out, groups].
        shape: out and in.
    """

    bits: int
    words: NDArray[np.int32]
    scales: Floats
    shape: tuple[int, ...]

    dtype = "F32"

    @property
    def format(self) -> str:
        """`int8` or `int4`."""
        return f"int{self.bits}"

    @property
    def values(self) -> Floats:
        """float32 [out, in]."""
        rows, columns = self.shape
        numbers = self.words.view(np.uint8)
        if self.bits == 4:
            numbers = np.stack([numbers & 15, numbers >> 4], -1).reshape(rows, -1)
        signed = numbers[:, :columns].astype(np.float32) - (1 << (self.bits - 1))
        groups = signed.reshape(rows, self.scales.shape[1], -1)
        return (groups * self.scales[:, :, None]).reshape(self.shape)


def packing_bits(values: Mapping[str, Any]) -> int | None:
    """How many bits the packed weights of a config.json have; None: it says nothing of packing.

    Raises:
        ModelError: a packing that cannot be read.
    """
    scheme = values.get("quantization_config")
    if not isinstance(scheme, dict) or scheme.get("quant_method") != "compressed-tensors":
        return None
    where = "quantization_config in config.json"
    groups = scheme.get("config_groups")
    if scheme.get("format") != "pack-quantized" or not isinstance(groups, dict) or not groups:
        raise ModelError(
            f"{where} has the format {scheme.get('format')!r:.40}, expected pack-quantized with "
            "config_groups: integers of 8 or 4 bits, weights only"
        )
    found = {_bits(where, name, group) for name, group in groups.items()}
    if len(found) > 1:
        raise ModelError(f"{where} mixes weights of {sorted(found)} bits, expected one width")
    if scheme.get("kv_cache_scheme") is not None:
        raise ModelError(f"{where} quantises the cache, too; choose that with --kv-format")
    return found.pop()


def _bits(where: str, name: str, group: Any) -> int:
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise ModelError(f"{where} has no weights in its group {name!r:.40}")
    for part in ("input_activations", "output_activations"):
        if group.get(part) is not None:
            raise ModelError(f"{where} quantises {part}; only weights can be packed")
    fields = Fields(group["weights"], f"{where}, group {name!r:.40}")
    bits = fields.integer("num_bits")
    wanted = {"num_bits": BITS, "type": ("int",), "symmetric": (True,), "dynamic": (False,)}
    for key, known in wanted.items():
        if key in fields and fields.values[key] not in known:
            raise fields.fail(key, " or ".join(map(str, known)))
    return bits


def unpacked(
    folder: object, tensors: Mapping[str, Stored | Packed], bits: int
) -> dict[str, Stored | Packed]:
    """Tensors by name, each packed matrix as one under its own name.

    Args:
        folder: where they are from, for errors.
        tensors: as the files hold them.
        bits: of the packed ones.

    Raises:
        ModelError: a part is missing, or the parts do not fit together.
    """
    found = dict(tensors)
    for name in [name for name in tensors if name.endswith(_PACKED)]:
        weight = name.removesuffix(_PACKED)
        for suffix, what in _FOREIGN.items():
            if weight + suffix in tensors:
                raise ModelError(f"{folder} packs {weight!r:.80} with {what}: not supported")
        parts = [found.pop(weight + suffix, None) for suffix in (_PACKED, _SCALE, _SHAPE)]
        found[weight] = _matrix(f"{weight!r:.80} of {folder}", parts, bits)
    return found


def _matrix(what: str, parts: list[Stored | Packed | None], bits: int) -> Packed:
    words, scale, size = parts
    if not (isinstance(words, Stored) and isinstance(scale, Stored) and isinstance(size, Stored)):
        raise ModelError(f"{what} lacks its weight_scale or weight_shape; download it again")
    if size.values.shape != (2,) or size.dtype not in ("I64", "I32") or (size.values < 1).any():
        raise ModelError(f"{what} has no weight_shape of two numbers; download it again")
    rows, columns = map(int, size.values)
    packed = (rows, -(-columns * bits // 32))
    if words.dtype != "I32" or words.values.shape != packed:
        raise ModelError(
            f"{what} is packed as {words.dtype} {list(words.values.shape)}, expected I32 "
            f"{list(packed)} for {rows}x{columns} numbers of {bits} bits"
        )
    scales = scale.values.reshape(1, 1) if scale.values.size == 1 else scale.values
    fits = scales.ndim == 2 and len(scales) in (1, rows) and columns % max(scales.shape[1], 1) == 0
    if scale.dtype not in _SCALES or not fits or not scales.size:
        raise ModelError(
            f"{what} has scales {scale.dtype} {list(scale.values.shape)}, expected a row of them "
            f"for each of {rows} outputs, for equal groups of the {columns} inputs"
        )
    wide = np.broadcast_to(to_float32(scale.dtype, scales), (rows, scales.shape[1]))
    return Packed(bits, np.ascontiguousarray(words.values), wide, (rows, columns))


def pack(matrix: Floats, bits: int = 8, group: int = 32) -> dict[str, NDArray[Any]]:
    """What follows `weight` in a name -> tensor, for float32 `matrix` [out, in].

    Scales are bfloat16 bits in uint16, the one that fits the largest weight of a group: packed
    again, what was packed once comes out the same. `group` inputs of a row share one.

    Raises:
        ModelError: groups do not divide the inputs, or not into whole words.
    """
    rows, columns = matrix.shape
    if columns % group or columns * bits % 32:
        raise ModelError(f"{columns} inputs cannot be packed in groups of {group} at {bits} bits")
    most = (1 << (bits - 1)) - 1
    groups = matrix.reshape(rows, -1, group)
    upper = np.abs(groups).max(-1) / np.float32(most)
    rounded = ((upper.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)
    scales = to_float32("BF16", rounded)
    safe = np.where(scales == 0, np.float32(1), scales)
    numbers = np.clip(np.rint(groups / safe[:, :, None]), -most, most)
    unsigned: NDArray[np.uint8] = (numbers.reshape(rows, -1) + (most + 1)).astype(np.uint8)
    if bits == 4:
        unsigned = (unsigned[:, ::2] | unsigned[:, 1::2] << 4).astype(np.uint8)
    return {
        _PACKED: np.ascontiguousarray(unsigned).view(np.int32),
        _SCALE: rounded,
        _SHAPE: np.array([rows, columns], np.int64),
    }


def scheme(bits: int = 8, group: int = 32) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint whose linear maps were packed, its head not."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
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
