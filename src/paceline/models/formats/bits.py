"""Integers of a few bits, packed into bytes or into 32-bit words."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint8]


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that `count` integers of `bits` take, without gaps."""
    return -(-count * bits // 8)


def pack_bits(codes: Codes, bits: int) -> Codes:
    """Pack integers along the last axis, without gaps, from the lowest bit of a byte up.

    Args:
        codes: uint8 [..., N], each below `2 ** bits`.
        bits: 1 to 8.

    Returns:
        uint8 [..., ceil(N * bits / 8)].
    """
    if bits == 8:
        return np.ascontiguousarray(codes)
    if bits == 4 and codes.shape[-1] % 2 == 0:
        return np.asarray(codes[..., ::2] | codes[..., 1::2] << 4, np.uint8)
    fields = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits]
    return np.packbits(fields.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def unpack_bits(packed: Codes, bits: int, count: int) -> Codes:
    """Return `count` integers along the last axis: the inverse of `pack_bits`."""
    if bits == 8:
        return np.ascontiguousarray(packed[..., :count])
    if bits == 4:
        pairs = np.stack([packed & 15, packed >> 4], -1)
        return np.ascontiguousarray(pairs.reshape(*packed.shape[:-1], -1)[..., :count])
    fields = np.unpackbits(packed, axis=-1, bitorder="little")[..., : count * bits]
    wide = np.zeros((*packed.shape[:-1], count, 8), np.uint8)
    wide[..., :bits] = fields.reshape(*packed.shape[:-1], count, bits)
    return np.packbits(wide, axis=-1, bitorder="little")[..., 0]


def unpack_fields(words: NDArray[Any], bits: int) -> Codes:
    """Return the integers of 32-bit words, `32 // bits` in each, none across two words.

    Args:
        words: int32 [..., W].
        bits: 1 to 8.

    Returns:
        uint8 [..., W * (32 // bits)], from the lowest bits of a word up.
    """
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    fields = (unsigned[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    return fields.astype(np.uint8).reshape(*words.shape[:-1], -1)


def pack_fields(codes: Codes, bits: int) -> NDArray[np.int32]:
    """Pack integers along the last axis into int32 words: the inverse of `unpack_fields`.

    A last word that is not full ends in zeros.
    """
    each = 32 // bits
    padding = [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % each)]
    padded = np.pad(codes, padding).reshape(*codes.shape[:-1], -1, each).astype(np.uint32)
    shifts = np.arange(each, dtype=np.uint32) * np.uint32(bits)
    words: NDArray[np.uint32] = np.bitwise_or.reduce(padded << shifts, axis=-1)
    return words.view(np.int32)
