"""Quantise float32 rows to the tensor types of GGUF files; `gguf_types.dequantize` is the inverse.

Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, TQ1_0, TQ2_0, F16 and BF16 equal the `gguf` package bit for bit. The
K types and IQ4 search for the scales and minima of least weighted squared error; so do Q4_0 to Q5_1
where the importance of inputs is given. Without it an error weighs as much as the root mean square
of its block plus the magnitude of the value: large weights matter more, as in llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.errors import ModelError, unknown
from paceline.machine import usable_cores
from paceline.models.formats.gguf_k_quantize import (
    FOUR,
    IQ4_TARGETS,
    NIBBLE,
    PACKERS,
    around,
    from_groups,
    half_bytes,
    iq4_codes,
    pack_two_bits,
    to_groups,
    to_integers,
    to_iq4,
)
from paceline.models.formats.gguf_scale_search import (
    Nearest,
    fit_affine,
    fit_scales,
    search_affine,
    search_scale,
)
from paceline.models.formats.gguf_types import TYPES

Bytes = NDArray[np.uint8]

_LARGEST = 1e9  # more than any type's half-precision scales can hold; squares do not overflow
_CHUNK = 1 << 16  # weights quantised at once: what the temporaries of a search take fits a cache


def quantize(name: str, values: Floats, importance: Floats | None = None) -> Bytes:
    """Return rows in a type of GGUF files.

    Args:
        name: one of `WRITABLE`.
        values: float32 [n, inputs].
        importance: weight of the squared error of each input, [inputs], at least 0, e.g. mean
            squares of activations. Types without a search ignore it.

    Returns:
        uint8 [n, row bytes].

    Raises:
        ModelError: an unknown type, rows that are not whole blocks, or values that are not finite
            or that the type cannot hold.
    """
    if name not in WRITABLE:
        raise ModelError(unknown("GGUF type", name, WRITABLE))
    values = np.ascontiguousarray(values, np.float32)
    count, inputs = values.shape
    row_bytes = TYPES[name].row_bytes(inputs)
    if not np.isfinite(values).all():
        raise ModelError("the values hold NaN or infinite numbers")
    if importance is not None:
        importance = _checked(importance, inputs)
    rows = max(1, _CHUNK // inputs)
    starts = range(0, count, rows)

    def work(start: int) -> Bytes:
        with np.errstate(all="ignore"):  # what overflows is looked for below
            return _pack(name, values[start : start + rows], importance).reshape(-1, row_bytes)

    if len(starts) < 2:
        parts = [work(start) for start in starts]
    else:
        with ThreadPoolExecutor(usable_cores()) as pool:
            parts = list(pool.map(work, starts))
    packed = np.concatenate(parts) if parts else np.empty((0, row_bytes), np.uint8)
    largest = float(np.abs(values).max(initial=0))
    if not TYPES[name].is_finite(packed) or (name in _SEARCHED and largest > _LARGEST):
        raise ModelError(
            f"values up to {largest:.3g} are more than {name} can hold; convert to f32 or bf16"
        )
    return packed


def _checked(importance: Floats, inputs: int) -> Floats | None:
    """Return the importance of inputs scaled to a mean of 1; None where all of it is 0."""
    importance = np.ascontiguousarray(importance, np.float32)
    if importance.shape != (inputs,):
        raise ModelError(f"the importance has shape {list(importance.shape)}, expected [{inputs}]")
    if not (np.isfinite(importance).all() and (importance >= 0).all()):
        raise ModelError("the importance of inputs holds numbers that are negative or not finite")
    mean = importance.mean(dtype=np.float64)
    return (importance / mean).astype(np.float32) if mean > 0 else None


def _pack(name: str, values: Floats, importance: Floats | None) -> Bytes:
    """Return the blocks of some rows as uint8 [n, bytes of a block]."""
    blocks = values.reshape(-1, TYPES[name].weights)
    if name in _PLAIN and (importance is None or name not in _SEARCHED):
        return _PLAIN[name](blocks)
    return _SEARCHED[name](blocks, _error_weights(blocks, values, importance))


def _error_weights(blocks: Floats, values: Floats, importance: Floats | None) -> Floats:
    """Return the weights of squared errors in the shape of the blocks."""
    if importance is None:
        weights: Floats = np.sqrt(np.square(blocks).mean(1, keepdims=True)) + np.abs(blocks)
        return weights
    return np.broadcast_to(importance, values.shape).reshape(blocks.shape)


def _f32(blocks: Floats) -> Bytes:
    return blocks.astype("<f4").view(np.uint8)


def _f16(blocks: Floats) -> Bytes:
    return blocks.astype("<f2").view(np.uint8)


def _bf16(blocks: Floats) -> Bytes:
    """Round the upper half of float32 to nearest, ties to even."""
    bits = blocks.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> 16 & 1))) >> 16
    return rounded.astype("<u2").view(np.uint8)


def _inverse(scales: Floats) -> Floats:
    """Return 1 / scale, 0 where that overflows: such a scale is 0 in half precision, too."""
    inverse = np.divide(np.float32(1), scales)
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def join_nibbles(codes: Bytes) -> Bytes:
    """Put codes i and i + 16 of a block into one byte: [n, 32] -> [n, 16]."""
    return codes[:, :16] & NIBBLE | codes[:, 16:] << FOUR


def pack_fifth_bits(codes: Bytes) -> Bytes:
    """Put bit 4 of the codes of a block into four bytes: [n, 32] -> [n, 4]."""
    return np.packbits(codes >> FOUR, axis=1, bitorder="little")


def _signed_codes(blocks: Floats, half: int) -> tuple[Bytes, Bytes]:
    """Return scales that map the largest magnitude to -half, as bytes, and codes above that."""
    peak = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    scale = peak / np.float32(-half)
    codes = np.trunc(blocks * _inverse(scale) + np.float32(half + 0.5)).astype(np.uint8)
    return half_bytes(scale), codes.clip(0, 2 * half - 1)


def _affine_codes(blocks: Floats, top: int) -> tuple[Bytes, Bytes, Bytes]:
    """Return scales and minima that span the range of values, as bytes, and codes."""
    low = blocks.min(1, keepdims=True)
    scale = (blocks.max(1, keepdims=True) - low) / np.float32(top)
    codes = np.trunc((blocks - low) * _inverse(scale) + np.float32(0.5)).astype(np.uint8)
    return half_bytes(scale), half_bytes(low), codes.clip(0, top)


def _q4_0(blocks: Floats) -> Bytes:
    scale, codes = _signed_codes(blocks, 8)
    return np.hstack([scale, join_nibbles(codes)])


def _q4_1(blocks: Floats) -> Bytes:
    scale, low, codes = _affine_codes(blocks, 15)
    return np.hstack([scale, low, join_nibbles(codes)])


def _q5_0(blocks: Floats) -> Bytes:
    scale, codes = _signed_codes(blocks, 16)
    return np.hstack([scale, pack_fifth_bits(codes), join_nibbles(codes)])


def _q5_1(blocks: Floats) -> Bytes:
    scale, low, codes = _affine_codes(blocks, 31)
    return np.hstack([scale, low, pack_fifth_bits(codes), join_nibbles(codes)])


def _q8_0(blocks: Floats) -> Bytes:
    """Halves round away from zero."""
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    codes = _round_away(blocks * _inverse(scale)).astype(np.int8)
    return np.hstack([half_bytes(scale), codes.view(np.uint8)])


def _round_away(values: Floats) -> Floats:
    size = np.abs(values)
    whole = np.floor(size)
    rounded: Floats = np.copysign(whole + np.floor(2 * (size - whole)), values)
    return rounded


def _ternary(blocks: Floats) -> tuple[Bytes, Bytes]:
    """Return scales, the largest magnitudes, as bytes, and digits 0 to 2 for -1 to 1."""
    scale = np.abs(blocks).max(1, keepdims=True)
    digits = _round_away(blocks * _inverse(scale)).astype(np.int8) + np.int8(1)
    return half_bytes(scale), digits.view(np.uint8)


def _tq1_0(blocks: Floats) -> Bytes:
    """Pack five digits in base 3 into a byte, as the fraction b / 256 that begins with them."""
    scale, digits = _ternary(blocks)
    powers = np.array([81, 27, 9, 3, 1], np.uint16)[:, None]
    runs = ((0, 160, 5), (160, 240, 5), (240, 256, 4))
    numbers = [
        (digits[:, begin:end].reshape(len(digits), count, -1) * powers[:count]).sum(1)
        for begin, end, count in runs
    ]
    fractions = (np.hstack(numbers) * 256 + 242) // 243
    return np.hstack([fractions.astype(np.uint8), scale])


def _tq2_0(blocks: Floats) -> Bytes:
    scale, digits = _ternary(blocks)
    return np.hstack([pack_two_bits(digits), scale])


def _searched_scale(
    blocks: Floats, weights: Floats, nearest: Nearest, targets: Floats
) -> tuple[Bytes, Floats]:
    """Return the best scales as bytes, and levels [32, n]."""
    x, w = to_groups(blocks, 32), to_groups(weights, 32)
    scales = search_scale(x, w, nearest, targets)[:, None]
    factor, _, levels = fit_scales(x, w, scales, nearest, (1, 1))
    return half_bytes(factor), levels


def _searched_affine(blocks: Floats, weights: Floats, top: int) -> tuple[Bytes, Bytes, Bytes]:
    """Return the best scales and minima as bytes, and codes."""
    x, w = to_groups(blocks, 32), to_groups(weights, 32)
    steps = around(top, 0.1, 10, 25)
    scales, minima = search_affine(x, w, top, steps, any_minimum=True)
    factor, offset, i, j, codes = fit_affine(x, w, scales[:, None], minima[:, None], top, 1)
    return half_bytes(factor * i[:, 0]), half_bytes(-offset * j[:, 0]), from_groups(codes)


def _best_q4_0(blocks: Floats, weights: Floats) -> Bytes:
    scale, levels = _searched_scale(blocks, weights, to_integers(-8, 7), -around(8, 0.1, 9, 9))
    return np.hstack([scale, join_nibbles(from_groups(levels, -8))])


def _best_q5_0(blocks: Floats, weights: Floats) -> Bytes:
    scale, levels = _searched_scale(blocks, weights, to_integers(-16, 15), -around(16, 0.1, 9, 9))
    codes = from_groups(levels, -16)
    return np.hstack([scale, pack_fifth_bits(codes), join_nibbles(codes)])


def _best_q4_1(blocks: Floats, weights: Floats) -> Bytes:
    scale, low, codes = _searched_affine(blocks, weights, 15)
    return np.hstack([scale, low, join_nibbles(codes)])


def _best_q5_1(blocks: Floats, weights: Floats) -> Bytes:
    scale, low, codes = _searched_affine(blocks, weights, 31)
    return np.hstack([scale, low, pack_fifth_bits(codes), join_nibbles(codes)])


def _iq4_nl(blocks: Floats, weights: Floats) -> Bytes:
    scale, levels = _searched_scale(blocks, weights, to_iq4, IQ4_TARGETS)
    return np.hstack([scale, join_nibbles(iq4_codes(levels))])


_PLAIN: dict[str, Callable[[Floats], Bytes]] = {
    **{"F32": _f32, "F16": _f16, "BF16": _bf16, "Q8_0": _q8_0, "TQ1_0": _tq1_0, "TQ2_0": _tq2_0},
    **{"Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1},
}
_SEARCHED: dict[str, Callable[[Floats, Floats], Bytes]] = {
    **{"Q4_0": _best_q4_0, "Q4_1": _best_q4_1, "Q5_0": _best_q5_0, "Q5_1": _best_q5_1},
    **PACKERS,
    "IQ4_NL": _iq4_nl,
}
WRITABLE = tuple(name for name in TYPES if name in _PLAIN or name in _SEARCHED)
