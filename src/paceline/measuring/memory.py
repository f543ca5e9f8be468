"""Memory that a model, its cache and its drafters use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from paceline.drafters.base import Drafter
from paceline.engines.base import Engine
from paceline.machine import peak_bytes


class MemoryUse(NamedTuple):
    """Memory in use.

    Attributes:
        peak_bytes: largest resident memory of this process so far, loading and all arms included.
        weight_bytes: size of the engine's matrices, shared ones once; None if not reported.
        cache_bytes: keys and values of the longest prompt and its answer; None if not reported.
        cache_positions: number of their tokens.
    """

    peak_bytes: int
    weight_bytes: int | None
    cache_bytes: int | None
    cache_positions: int


def measure_memory(engine: Engine, longest: Sequence[int]) -> MemoryUse:
    """Measure this process and an engine; `longest` is run once for the size of its cache."""
    peak = peak_bytes()
    sequence = engine.start(np.asarray(longest, np.int32))
    try:
        cache: int | None = getattr(sequence, "bytes", None)
    finally:
        engine.release(sequence)
    whole = engine.weight_bytes
    held = None if whole is None else whole - engine.shared_bytes
    return MemoryUse(peak, held, cache, len(longest))


def state_bytes(drafter: Drafter) -> int:
    """Return the size of what a drafter has learnt, as it would be saved."""
    return sum(array.nbytes for array in drafter.state().values())
