"""Checks of the arguments of engine operations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from paceline.core import Floats, Tokens
from paceline.engines.base import Cached, Engine
from paceline.errors import RequestError


def check_kept(engine: Engine, sequence: Cached, kept: Sequence[ArrayLike]) -> list[Tokens]:
    """Return the rows that `Engine.evict` is to keep, int32 [H_kv, K] for each layer.

    Raises:
        RequestError: there is not one array for each layer, or one does not fit.
    """
    layers = engine.config.layers
    if len(kept) != len(layers):
        raise RequestError(f"rows to keep of {len(kept)} layers, expected {len(layers)}")
    return [
        _rows(index, layer.kv_heads, engine.rows(sequence, index), given)
        for index, (layer, given) in enumerate(zip(layers, kept, strict=True))
    ]


def check_rows(engine: Engine, sequence: Cached, rows: Sequence[tuple[Floats, Floats]]) -> int:
    """Return how many positions `Engine.append_rows` is to commit.

    Raises:
        RequestError: there is not one pair for each layer, one does not fit, or the context is
            full.
    """
    layers = engine.config.layers
    if len(rows) != len(layers):
        raise RequestError(f"keys and values of {len(rows)} layers, expected {len(layers)}")
    count = rows[0][0].shape[1] if rows[0][0].ndim == 3 else 0
    for index, (layer, pair) in enumerate(zip(layers, rows, strict=True)):
        shape = (layer.kv_heads, count, layer.head_dim)
        for array in pair:
            if array.dtype != np.float32 or array.shape != shape or not array.flags.c_contiguous:
                raise RequestError(
                    f"rows of layer {index} are {array.dtype} {list(array.shape)}, expected "
                    f"contiguous float32 {list(shape)}"
                )
    if sequence.length + count > engine.config.context:
        raise RequestError(
            f"{count} rows behind {sequence.length} end beyond the model's context of "
            f"{engine.config.context} tokens"
        )
    return count


def _rows(index: int, heads: int, positions: Tokens, given: ArrayLike) -> Tokens:
    held = positions.shape[1]
    rows = np.asarray(given)
    if rows.ndim == 1:
        rows = np.broadcast_to(rows, (heads, len(rows)))
    right = rows.ndim == 2 and len(rows) == heads
    if not right or (rows.size and not np.issubdtype(rows.dtype, np.integer)):
        raise RequestError(
            f"the rows to keep of layer {index} are {given!r:.80}, expected increasing indices "
            f"[{heads}, K]"
        )
    left_out = rows == -1  # before the rows of heads that keep fewer than others
    first = (positions < 0).sum(1, keepdims=True)  # of the rows that a head holds
    outside = (~left_out & ((rows < first) | (rows >= held))).any()
    steps = np.diff(rows, axis=1)
    if outside or (~left_out[:, 1:] & (steps <= 0)).any() or (steps[left_out[:, 1:]] < 0).any():
        raise RequestError(
            f"the rows to keep of layer {index} are {given!r:.80}, expected increasing indices "
            f"below {held}"
        )
    return np.ascontiguousarray(rows[:, ~left_out.all(0)], np.int32)
