"""AWQ's layout of packed weights, as AutoAWQ (`gemm`) and transformers write it.

A linear map [out, in] is `qweight` int32 [in, out / 8] and `qzeros` int32 [groups, out / 8], the
4-bit codes and zero points of eight neighbouring outputs in a word: from the lowest bits up those
of the outputs 0, 2, 4, 6, 1, 3, 5, 7; and `scales` [groups, out]. W = (code - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.errors import ModelError
from paceline.models.fields import Fields
from paceline.models.formats.bits import Codes, pack_fields, unpack_fields
from paceline.models.formats.gptq import WHERE, group_size
from paceline.models.formats.packed import (
    FLOATS,
    FileTensor,
    Packed,
    check_part,
    group_count,
    plain_zeros,
    scale_rows,
    take_parts,
)
from paceline.models.formats.safetensors import Stored
from paceline.models.tensors import Grouped, narrow

BITS, _EACH = 4, 8
_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # the output of each four bits of a word
_PLACE = np.argsort(_ORDER)


@dataclass(frozen=True)
class AWQLayout:
    """The settings of a checkpoint.

    Attributes:
        group: inputs that share a scale, or None for whole rows.
    """

    group: int | None

    @classmethod
    def of(cls, scheme: Mapping[str, Any]) -> AWQLayout:
        """Read a `quantization_config`.

        Raises:
            ModelError: a setting is missing or not supported.
        """
        fields = Fields(scheme, WHERE)
        if fields.integer("bits") != BITS:
            raise fields.fail("bits", str(BITS))
        if fields.text("version", "gemm").lower() != "gemm":
            raise fields.fail("version", "gemm; save it in that layout again")
        if not fields.boolean("zero_point", True):
            raise fields.fail("zero_point", "true")
        return cls(group_size(fields))

    def collect(self, folder: object, tensors: Mapping[str, Stored]) -> dict[str, FileTensor]:
        """Return the tensors with each packed matrix as one; see `Packing.collect`."""
        rest: dict[str, FileTensor] = dict(tensors)
        for name in [name for name in tensors if name.endswith(".qweight")]:
            module = name.removesuffix("qweight")
            parts = take_parts(folder, rest, module, ("qweight", "qzeros", "scales"))
            rest[module + "weight"] = self._matrix(f"{{}} of {module!r:.80} in {folder}", parts)
        return rest

    def _matrix(self, what: str, parts: Mapping[str, Stored]) -> Packed:
        words = parts["qweight"]
        if len(words.shape) != 2 or not all(words.shape):
            raise ModelError(
                f"{what.format('qweight')} has shape {list(words.shape)}, expected two axes"
            )
        inputs, rows = words.shape[0], words.shape[1] * _EACH
        group = self.group or inputs
        groups = group_count(inputs, group)

        def part(name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> NDArray[Any]:
            return check_part(what.format(name), parts[name], dtypes, shape)

        codes = part("qweight", ("I32",), (inputs, rows // _EACH))
        zeros = part("qzeros", ("I32",), (groups, rows // _EACH))
        scales, kind = part("scales", FLOATS, (groups, rows)), parts["scales"].dtype

        def read() -> Grouped:
            return Grouped(
                BITS,
                _unpack(codes),
                scale_rows(scales, kind, turned=True),
                group,
                plain_zeros(_unpack(zeros).astype(np.uint16), BITS),
                scale_type=kind,
            )

        return Packed((rows, inputs), f"int{BITS}", read)

    def save(self, matrix: Grouped) -> dict[str, NDArray[Any]]:
        """Return what follows the module's name in a checkpoint: `qweight` and the others.

        Raises:
            ModelError: this layout cannot hold the matrix.
        """
        rows, inputs = matrix.shape
        group, zeros = self.group or inputs, matrix.zeros
        if zeros is None:
            zeros = np.full(matrix.scales.shape, 1 << (BITS - 1), np.uint16)
        fits = matrix.bits == BITS and matrix.group == group and not rows % _EACH
        if not fits or matrix.minima is not None or matrix.g_idx is not None or zeros.max() > 15:
            raise ModelError(
                f"AWQ's layout holds codes of {BITS} bits in groups of {group} in order, with zero "
                f"points below 16 and a multiple of {_EACH} outputs; this matrix is another"
            )
        return {
            "qweight": _pack(matrix.codes),
            "qzeros": _pack(zeros.astype(np.uint8)),
            "scales": np.ascontiguousarray(narrow(matrix.scales, matrix.scale_type).T),
        }


def _unpack(words: NDArray[Any]) -> Codes:
    """Return the codes [out, N] of words [N, out / 8]."""
    fields = unpack_fields(words, BITS).reshape(len(words), -1, _EACH)[:, :, _PLACE]
    return np.ascontiguousarray(fields.reshape(len(words), -1).T)


def _pack(codes: Codes) -> NDArray[np.int32]:
    """Return the words [N, out / 8] of codes [out, N]."""
    fields = codes.T.reshape(codes.shape[1], -1, _EACH)[:, :, _ORDER]
    return pack_fields(np.ascontiguousarray(fields.reshape(codes.shape[1], -1)), BITS)
