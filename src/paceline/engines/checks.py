"""Checks of the arguments of engine operations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from paceline.core import Tokens
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
