"""Memory: how fast this machine reads it, and how much of it one plain token needs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import NamedTuple

import numpy as np

from paceline.engines.base import Engine
from paceline.machine import largest_cache, usable_cores

_LEAST = 256 << 20  # bytes of the buffer where no larger cache asks for more


class Bandwidth(NamedTuple):
    """What was measured.

    Attributes:
        bytes_per_second: best of several streaming reads.
        buffer_bytes: size of what was read, at least eight times the largest cache.
        threads: that read it.
    """

    bytes_per_second: float
    buffer_bytes: int
    threads: int


def measure_bandwidth(threads: int | None = None, repeats: int = 4) -> Bandwidth:
    """Read a buffer far larger than the caches; `threads` default to the usable cores."""
    threads = threads or usable_cores()
    size = max(_LEAST, 8 * largest_cache())
    buffer = np.ones(size // 8, np.uint64)
    parts = np.array_split(buffer, 8 * threads)
    best = np.inf
    # An OR over integers is the cheapest reduction: it waits for memory, not for arithmetic.
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            start = perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            best = min(best, perf_counter() - start)
    return Bandwidth(buffer.nbytes / best, buffer.nbytes, threads)


def bytes_per_token(engine: Engine, context: float) -> int | None:
    """Bytes that one plain token reads: every matrix once, and the keys and values it sees.

    Args:
        engine: what runs; None is returned where it does not tell the size of its matrices.
        context: cached positions.
    """
    matrices = engine.weight_bytes
    if matrices is None:
        return None
    seen = [
        2 * layer.kv_heads * layer.head_dim * min(context, layer.window or context)
        for layer in engine.config.layers
    ]
    return matrices + round(sum(seen) * 4)  # float32
