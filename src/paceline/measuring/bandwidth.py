"""Memory bandwidth of this machine, and the bytes that a plain token reads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import NamedTuple

import numpy as np

from paceline.engines.base import Engine
from paceline.machine import largest_cache, usable_cores
from paceline.models.config import LayerConfig

_MIN_BUFFER = 256 << 20  # bytes


class Bandwidth(NamedTuple):
    """A measured memory bandwidth.

    Attributes:
        bytes_per_second: the best of several streaming reads.
        buffer_bytes: size of the buffer that was read, at least eight times the largest cache.
        threads: number of threads that read it.
    """

    bytes_per_second: float
    buffer_bytes: int
    threads: int


def measure_bandwidth(threads: int | None = None, repeats: int = 4) -> Bandwidth:
    """Measure the read bandwidth with a buffer far larger than the caches.

    Args:
        threads: number of threads; None takes the usable cores.
        repeats: number of reads, of which the best counts.
    """
    threads = threads or usable_cores()
    size = max(_MIN_BUFFER, 8 * largest_cache())
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
    """Return the bytes that one plain token reads: every matrix, and the keys and values it sees.

    Args:
        engine: runs the model.
        context: cached positions.

    Returns:
        a number of bytes; None if the engine does not report the size of its weights.
    """
    matrices = engine.weight_bytes
    if matrices is None:
        return None
    seen = [
        2 * layer.kv_heads * layer.head_dim * _rows_read(layer, context)
        for layer in engine.config.layers
    ]
    return matrices + round(sum(seen) * 4)  # float32


def _rows_read(layer: LayerConfig, context: float) -> float:
    return context if layer.window is None else min(context, layer.window + layer.sinks)
