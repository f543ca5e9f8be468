"""GPTQ's layout of packed weights, as AutoGPTQ, GPTQModel and transformers write it.

A linear map [out, in] is `qweight` int32 [in * bits / 32, out], codes of neighbouring inputs in a
word from the lowest bit up; `scales` [groups, out]; `qzeros` int32 [groups, out * bits / 32], zero
points of neighbouring outputs in a word; and `g_idx` int32 [in], the group of each input, which are
out of order where the quantiser worked in the order of activations (`desc_act`). Checkpoints of the
first version (`gptq`) hold each zero point less one, modulo `2 ** bits`; those of the second
(`gptq_v2`) hold it as it is. W = (code - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.errors import ModelError
from paceline.models.fields import Fields
from paceline.models.formats.bits import pack_bits, packed_size, unpack_bits
from paceline.models.formats.packed import (
    FLOATS,
    FileTensor,
    Packed,
    check_part,
    group_count,
    plain_order,
    plain_zeros,
    scale_rows,
    take_parts,
)
from paceline.models.formats.safetensors import Stored
from paceline.models.tensors import Grouped, narrow

WHERE = "quantization_config in config.json"
BITS = (2, 3, 4, 8)
_VERSIONS = {"gptq": 1, "gptq_v2": 0}  # what is taken from a stored zero point


@dataclass(frozen=True)
class GPTQLayout:
    """The settings of a checkpoint.

    Attributes:
        bits: of a code.
        group: inputs that share a scale, or None for whole rows.
        version: `gptq` or `gptq_v2`.
    """

    bits: int
    group: int | None
    version: str = "gptq"

    @classmethod
    def of(cls, scheme: Mapping[str, Any]) -> GPTQLayout:
        """Read a `quantization_config`.

        Raises:
            ModelError: a setting is missing or not supported.
        """
        fields = Fields(scheme, WHERE)
        bits = fields.integer("bits")
        if bits not in BITS:
            raise fields.fail("bits", "2, 3, 4 or 8")
        version = fields.text("checkpoint_format", "gptq")
        if version not in _VERSIONS or scheme.get("is_marlin_format"):
            raise fields.fail("checkpoint_format", "gptq or gptq_v2; save it in that layout again")
        if fields.text("pack_dtype", "int32") != "int32":
            raise fields.fail("pack_dtype", "int32")
        return cls(bits, group_size(fields), version)

    def collect(self, folder: object, tensors: Mapping[str, Stored]) -> dict[str, FileTensor]:
        """Return the tensors with each packed matrix as one; see `Packing.collect`."""
        rest: dict[str, FileTensor] = dict(tensors)
        for name in [name for name in tensors if name.endswith(".qweight")]:
            module = name.removesuffix("qweight")
            names = ("qweight", "qzeros", "scales", "g_idx?")
            parts = take_parts(folder, rest, module, names)
            rest[module + "weight"] = self._matrix(f"{{}} of {module!r:.80} in {folder}", parts)
        return rest

    def _matrix(self, what: str, parts: Mapping[str, Stored]) -> Packed:
        bits, words = self.bits, parts["qweight"]
        if len(words.shape) != 2 or not all(words.shape):
            raise ModelError(
                f"{what.format('qweight')} has shape {list(words.shape)}, expected two axes"
            )
        inputs, rows = words.shape[0] * 32 // bits, words.shape[1]
        group = self.group or inputs
        groups = group_count(inputs, group)

        def part(name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> NDArray[Any]:
            return check_part(what.format(name), parts[name], dtypes, shape)

        part("qweight", ("I32",), (packed_size(inputs, bits) // 4, rows))
        scales = part("scales", FLOATS, (groups, rows))
        zeros = part("qzeros", ("I32",), (groups, -(-rows * bits // 32)))
        order = part("g_idx", ("I32",), (inputs,)) if "g_idx" in parts else None
        kind, less = parts["scales"].dtype, _VERSIONS[self.version]

        def read() -> Grouped:
            codes = unpack_bits(_bytes(words.values.T), bits, inputs)
            held = unpack_bits(_bytes(zeros), bits, rows).T.astype(np.uint16)
            points = (held + np.uint16(less)) & np.uint16((1 << bits) - 1)
            return Grouped(
                bits,
                codes,
                scale_rows(scales, kind, turned=True),
                group,
                plain_zeros(np.ascontiguousarray(points), bits),
                g_idx=plain_order(order, group, inputs),
                scale_type=kind,
            )

        return Packed((rows, inputs), f"int{bits}", read)

    def save(self, matrix: Grouped) -> dict[str, NDArray[Any]]:
        """Return what follows the module's name in a checkpoint: `qweight` and the others.

        Raises:
            ModelError: this layout cannot hold the matrix.
        """
        rows, inputs = matrix.shape
        group = self.group or inputs
        if matrix.bits != self.bits or matrix.group != group or matrix.minima is not None:
            raise ModelError(
                f"GPTQ's layout of {self.bits} bits in groups of {group} cannot hold a matrix of "
                f"{matrix.bits} bits in groups of {matrix.group}, or with minima"
            )
        if inputs * self.bits % 32 or rows * self.bits % 32:
            raise ModelError(f"GPTQ's layout cannot hold {rows}x{inputs} codes in whole words")
        zeros = matrix.zeros
        if zeros is None:
            zeros = np.full(matrix.scales.shape, 1 << (self.bits - 1), np.uint16)
        held = (zeros - np.uint16(_VERSIONS[self.version])) & np.uint16((1 << self.bits) - 1)
        words = pack_bits(matrix.codes, self.bits).view(np.int32)
        return {
            "qweight": np.ascontiguousarray(words.T),
            "qzeros": pack_bits(np.ascontiguousarray(held.T.astype(np.uint8)), self.bits).view(
                np.int32
            ),
            "scales": np.ascontiguousarray(narrow(matrix.scales, matrix.scale_type).T),
            "g_idx": matrix.groups.astype(np.int32),
        }


def group_size(fields: Fields) -> int | None:
    """Return the inputs that share a scale; None where -1 stands for whole rows."""
    if fields.get("group_size") == -1:
        return None
    return fields.integer("group_size")


def _bytes(words: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(words).view(np.uint8)
