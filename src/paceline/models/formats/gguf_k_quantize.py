"""Pack the super-blocks of 256 weights of GGUF's K types and of IQ4_XS.

Each function takes values and error weights [n, 256] and returns the bytes of n blocks. The layouts
are those of `ggml-common.h` of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.models.formats.gguf_scale_search import (
    Nearest,
    fit_affine,
    fit_scales,
    search_affine,
    search_scale,
)

Bytes = NDArray[np.uint8]
TWO, FOUR, SIX = np.uint8(2), np.uint8(4), np.uint8(6)  # shifts that keep bytes bytes
NIBBLE = np.uint8(15)
IQ4_LEVELS = np.array(
    (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), np.float32
)


def to_integers(low: int, high: int) -> Nearest:
    """Return the function that rounds to the integers from `low` to `high`."""

    def nearest(values: Floats) -> Floats:
        clipped: Floats = np.clip(np.rint(values, out=values), low, high, out=values)
        return clipped

    return nearest


def to_iq4(values: Floats) -> Floats:
    """Round to the 16 levels of IQ4_NL: the midpoints between them are multiples of a half."""
    doubled = np.clip(np.floor(values * np.float32(2)), -256, 255).astype(np.int16)
    levels: Floats = _IQ4_NEAREST[doubled + 256]
    return levels


def _iq4_table() -> Floats:
    places = (np.arange(-256, 256) + 0.5) / 2  # the middle of each half unit
    levels: Floats = IQ4_LEVELS[np.abs(places[:, None] - IQ4_LEVELS).argmin(1)]
    return levels


_IQ4_NEAREST = _iq4_table()
IQ4_TARGETS = np.concatenate(
    [np.arange(-136, -117, 2, dtype=np.float32), np.arange(105, 122, 2, dtype=np.float32)]
)


def around(centre: float, step: float, below: int, above: int) -> Floats:
    """Return evenly spaced trial values, the centre among them: it finds what is already exact."""
    return np.float32(centre) + np.float32(step) * np.arange(-below, above + 1, dtype=np.float32)


def to_groups(blocks: Floats, size: int) -> Floats:
    """Return blocks [n, B] as groups of `size` values: [size, n * B / size]."""
    return np.ascontiguousarray(blocks.reshape(-1, size).T)


def from_groups(groups: Floats, low: int = 0) -> Bytes:
    """Return levels [k, n * S] as unsigned codes above `low`, [n * S, k]."""
    return np.ascontiguousarray((groups - np.float32(low)).astype(np.uint8).T)


def half_bytes(values: Floats) -> Bytes:
    """Return numbers that half precision holds as bytes, [n, 2]."""
    return np.ascontiguousarray(values).astype("<f2").view(np.uint8).reshape(-1, 2)


def _symmetric(
    x: Floats, w: Floats, size: int, nearest: Nearest, targets: Floats, limits: tuple[int, int]
) -> tuple[Floats, Floats, Floats]:
    """Return the factors [n], integers [n, 256 / size] and levels of blocks without minima."""
    n = len(x)
    x, w = to_groups(x, size), to_groups(w, size)
    scales = search_scale(x, w, nearest, targets)
    return fit_scales(x, w, scales.reshape(n, -1), nearest, limits)


def _affine(
    x: Floats, w: Floats, size: int, top: int, steps: Floats, limit: int
) -> tuple[Bytes, Bytes, Bytes, Bytes, Bytes]:
    """Return factor and offset as bytes, the integers of scales and minima, and codes."""
    n = len(x)
    x, w = to_groups(x, size), to_groups(w, size)
    scales, minima = search_affine(x, w, top, steps)
    factor, offset, i, j, codes = fit_affine(
        x, w, scales.reshape(n, -1), minima.reshape(n, -1), top, limit
    )
    halves = half_bytes(factor), half_bytes(offset)
    return *halves, i.astype(np.uint8), j.astype(np.uint8), from_groups(codes)


def pack_two_bits(codes: Bytes) -> Bytes:
    """Put four runs of 32 codes of 2 bits into 32 bytes, twice: [n, 256] -> [n, 64]."""
    runs = codes.reshape(-1, 2, 4, 32)
    packed = runs[:, :, 0] | runs[:, :, 1] << TWO | runs[:, :, 2] << FOUR | runs[:, :, 3] << SIX
    joined: Bytes = packed.reshape(-1, 64)
    return joined


def pack_bit(codes: Bytes, bit: int) -> Bytes:
    """Put one bit of eight runs of 32 codes into 32 bytes: [n, 256] -> [n, 32]."""
    runs = codes.reshape(-1, 8, 32) >> np.uint8(bit) & np.uint8(1)
    return np.packbits(runs, axis=1, bitorder="little").reshape(-1, 32)


def pack_pairs(codes: Bytes) -> Bytes:
    """Put pairs of runs of 32 codes into the halves of 32 bytes: [n, 256] -> [n, 128]."""
    pairs = codes.reshape(-1, 4, 2, 32) & NIBBLE
    return (pairs[:, :, 0] | pairs[:, :, 1] << FOUR).reshape(-1, 128)


def pack_six_bits(codes: Bytes) -> Bytes:
    """Put the lower four bits of 256 codes into 128 bytes, the upper two into 64 (Q6_K)."""
    low = codes.reshape(-1, 2, 4, 32) & NIBBLE
    nibbles = (low[:, :, :2] | low[:, :, 2:] << FOUR).reshape(-1, 128)
    return np.hstack([nibbles, pack_two_bits(codes >> FOUR)])


def pack_halves(codes: Bytes) -> Bytes:
    """Put codes i and i + 16 of each 32 into one byte: [n, 256] -> [n, 128] (IQ4_XS)."""
    halves = codes.reshape(-1, 8, 2, 16)
    return (halves[:, :, 0] | halves[:, :, 1] << FOUR).reshape(-1, 128)


def _pack_scales(i: Bytes, j: Bytes) -> Bytes:
    """Pack eight pairs of integers of 6 bits into 12 bytes (Q4_K, Q5_K)."""
    first = i[:, :4] | i[:, 4:] >> FOUR << SIX
    second = j[:, :4] | j[:, 4:] >> FOUR << SIX
    return np.hstack([first, second, i[:, 4:] & NIBBLE | j[:, 4:] << FOUR])


def q2_k(x: Floats, w: Floats) -> Bytes:
    """Quantise to 2 bits with scale and minimum for each 16 weights, of 4 bits each."""
    factor, offset, i, j, codes = _affine(x, w, 16, 3, around(3, 0.15, 7, 9), 15)
    return np.hstack([i | j << FOUR, pack_two_bits(codes), factor, offset])


def q3_k(x: Floats, w: Floats) -> Bytes:
    """Quantise to 3 bits with a scale of 6 bits for each 16 weights."""
    targets = -around(4, 0.15, 9, 9)
    factor, i, levels = _symmetric(x, w, 16, to_integers(-4, 3), targets, (-32, 31))
    codes, scales = from_groups(levels, -4), (i + 32).astype(np.uint8)
    low = scales[:, :8] & NIBBLE | scales[:, 8:] << FOUR
    high = scales >> FOUR
    high = high[:, :4] | high[:, 4:8] << TWO | high[:, 8:12] << FOUR | high[:, 12:] << SIX
    return np.hstack(
        [pack_bit(codes, 2), pack_two_bits(codes & np.uint8(3)), low, high, half_bytes(factor)]
    )


def q4_k(x: Floats, w: Floats) -> Bytes:
    """Quantise to 4 bits with scale and minimum of 6 bits for each 32 weights."""
    factor, offset, i, j, codes = _affine(x, w, 32, 15, around(15, 0.125, 10, 8), 63)
    return np.hstack([factor, offset, _pack_scales(i, j), pack_pairs(codes)])


def q5_k(x: Floats, w: Floats) -> Bytes:
    """Quantise to 5 bits with scale and minimum of 6 bits for each 32 weights."""
    factor, offset, i, j, codes = _affine(x, w, 32, 31, around(31, 0.125, 10, 8), 63)
    high = pack_bit(codes, 4)
    return np.hstack([factor, offset, _pack_scales(i, j), high, pack_pairs(codes)])


def q6_k(x: Floats, w: Floats) -> Bytes:
    """Quantise to 6 bits with a scale of 8 bits for each 16 weights."""
    targets = -around(32, 0.1, 9, 9)
    factor, i, levels = _symmetric(x, w, 16, to_integers(-32, 31), targets, (-128, 127))
    scales = i.astype(np.int8).view(np.uint8)
    return np.hstack([pack_six_bits(from_groups(levels, -32)), scales, half_bytes(factor)])


def iq4_codes(levels: Floats) -> Bytes:
    """Return the indices of levels of IQ4_NL, [k, G] -> [G, k]."""
    table = np.zeros(256, np.uint8)
    table[(IQ4_LEVELS + 128).astype(int)] = np.arange(16)
    return table[from_groups(levels, -128)]


def iq4_xs(x: Floats, w: Floats) -> Bytes:
    """Quantise to 16 uneven levels with a scale of 6 bits for each 32 weights."""
    factor, i, levels = _symmetric(x, w, 32, to_iq4, IQ4_TARGETS, (-32, 31))
    scales = (i + 32).astype(np.uint8)
    high = (scales >> FOUR).astype(np.uint16) << np.arange(0, 16, 2, dtype=np.uint16)
    top = high.sum(1, dtype=np.uint16).astype("<u2").view(np.uint8).reshape(-1, 2)
    low = scales[:, ::2] & NIBBLE | scales[:, 1::2] << FOUR
    return np.hstack([half_bytes(factor), top, low, pack_halves(iq4_codes(levels))])


PACKERS: dict[str, Callable[[Floats, Floats], Bytes]] = {
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
    "IQ4_XS": iq4_xs,
}
