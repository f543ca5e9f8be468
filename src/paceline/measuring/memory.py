"""Bytes that a model, its cache and its drafters hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from paceline.drafters.base import Drafter
from paceline.engines.base import Engine
from paceline.machine import peak_bytes


class Memory(NamedTuple):
    """What was held.

    Attributes:
        peak_bytes: most that this process ever had in memory, all arms and the loading included.
        weight_bytes: of the engine's matrices; None where it does not tell.
        cache_bytes: keys and values of the longest prompt and its answer; None likewise.
        cache_positions: tokens of these.
    """

    peak_bytes: int
    weight_bytes: int | None
    cache_bytes: int | None
    cache_positions: int


def measure_memory(engine: Engine, longest: Sequence[int]) -> Memory:
    """Of this process and an engine, with `longest` run once for the size of its cache."""
    peak = peak_bytes()
    sequence = engine.start(np.asarray(longest, np.int32))
    try:
        cache: int | None = getattr(sequence, "bytes", None)
    finally:
        engine.release(sequence)
    return Memory(peak, engine.weight_bytes, cache, len(longest))


def state_bytes(drafter: Drafter) -> int:
    """What a drafter has learnt, as it would be saved."""
    return sum(array.nbytes for array in drafter.state().values())
