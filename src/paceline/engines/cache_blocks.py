"""Reads the native engine's blocks of cached keys and values."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats

_BLOCK = 64  # positions of a block
_PANEL = 16
_TYPES = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8}


def unpack_blocks(
    blocks: NDArray[np.uint8], heads: int, rows: int, dim: int, kind: str
) -> tuple[Floats, Floats]:
    """Return the keys and values of a layer, two arrays float32 [H_kv, R, D].

    Args:
        blocks: uint8 [H_kv * B, bytes]: keys [64 / 16, D, 16], values [D / 16, 64, 16] with D
            padded to a multiple of 16, and in int8 the scales of 64 keys and of 64 values.
        heads: H_kv.
        rows: R, up to 64 B.
        dim: D.
        kind: format of the cache: fp32, fp16 or int8.
    """
    stored = np.dtype(_TYPES[kind])
    padded = -(-dim // _PANEL) * _PANEL
    count = len(blocks)
    ends = np.cumsum([_BLOCK * dim * stored.itemsize, _BLOCK * padded * stored.itemsize])
    keys = blocks[:, : ends[0]].copy().view(stored).astype(np.float32)
    values = blocks[:, ends[0] : ends[1]].copy().view(stored).astype(np.float32)
    keys = keys.reshape(count, _BLOCK // _PANEL, dim, _PANEL).transpose(0, 1, 3, 2)
    values = values.reshape(count, padded // _PANEL, _BLOCK, _PANEL).transpose(0, 2, 1, 3)
    keys = keys.reshape(count, _BLOCK, dim)
    values = values.reshape(count, _BLOCK, padded)[..., :dim]
    if stored == np.int8:
        scales = blocks[:, ends[1] :].copy().view(np.float32)[:, : 2 * _BLOCK]
        with np.errstate(all="ignore"):  # places behind the rows hold anything
            keys = keys * scales[:, :_BLOCK, None]
            values = values * scales[:, _BLOCK:, None]
    shape = (heads, -1, dim)
    return (
        np.ascontiguousarray(keys.reshape(shape)[:, :rows]),
        np.ascontiguousarray(values.reshape(shape)[:, :rows]),
    )
