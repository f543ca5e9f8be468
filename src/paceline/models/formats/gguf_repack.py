"""Store integers in groups as blocks of GGUF, value for value.

`Grouped` matrices hold `(code - zero) * scale`, and so do the types of 32 weights without minima;
one with a scale for 64 or 128 inputs repeats it. Nothing is rounded but scales that half precision
does not hold, by less than the rounding of the values to half precision would.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.models.formats.gguf_quantize import join_nibbles, pack_fifth_bits
from paceline.models.formats.gguf_scale_search import to_half
from paceline.models.tensors import Grouped

BLOCK = 32
_HALVES = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}  # type -> codes are -half to half - 1
_ROUNDING = 2.0**-11  # largest relative error of half precision


def block_type(matrix: Grouped) -> str | None:
    """Return the smallest type that holds the integers of a matrix; None where there is none.

    Zero points are integers here: `code - zero` has to fit the type's codes.
    """
    inputs, group = matrix.shape[1], matrix.group
    whole = inputs % BLOCK == 0 and (group % BLOCK == 0 or group >= inputs)
    if matrix.minima is not None or matrix.g_idx is not None or not whole:
        return None
    halves = to_half(matrix.scales)
    if (np.abs(halves - matrix.scales) > _ROUNDING * np.abs(matrix.scales)).any():
        return None
    top = (1 << matrix.bits) - 1
    low, high = -(1 << (matrix.bits - 1)), (1 << (matrix.bits - 1)) - 1
    if matrix.zeros is not None:  # of any codes: rows of the matrix fit whatever they hold
        low, high = -int(matrix.zeros.max(initial=0)), top - int(matrix.zeros.min(initial=0))
    fitting = (name for name, half in _HALVES.items() if -half <= low and high < half)
    return next(fitting, None)


def is_exact(matrix: Grouped) -> bool:
    """Return whether half precision holds all scales."""
    return np.array_equal(to_half(matrix.scales), matrix.scales)


def to_blocks(matrix: Grouped, name: str) -> NDArray[np.uint8]:
    """Return the rows of a matrix in the type that `block_type` chose, uint8 [out, row bytes]."""
    rows, inputs = matrix.shape
    at = np.arange(inputs) // matrix.group
    if matrix.zeros is None:
        zeros: NDArray[np.int16] | np.int16 = np.int16(1 << (matrix.bits - 1))
    else:
        zeros = matrix.zeros.astype(np.int16)[:, at]
    shift = np.int16(0 if name == "Q8_0" else _HALVES[name])
    integers = (matrix.codes.astype(np.int16) - zeros + shift).reshape(-1, BLOCK)
    parts = [_scales(matrix.scales[:, at[::BLOCK]])]
    if name == "Q8_0":
        parts.append(integers.astype(np.int8).view(np.uint8))
    else:
        codes = integers.astype(np.uint8)
        parts += [pack_fifth_bits(codes)] if name == "Q5_0" else []
        parts.append(join_nibbles(codes))
    return np.hstack(parts).reshape(rows, -1)


def _scales(scales: Floats) -> NDArray[np.uint8]:
    return np.ascontiguousarray(scales.astype("<f2")).reshape(-1, 1).view(np.uint8)
