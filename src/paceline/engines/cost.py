"""T(n): the time of one forward pass over n tree nodes, on this machine with this model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter

import numpy as np

from paceline.core import Cost, TokenTree
from paceline.engines.base import Engine

SIZES = (1, 2, 4, 8, 16, 32, 64)
CONTEXT = 128  # committed positions, unless the model sees less


def measure_cost(
    engine: Engine,
    context: int | None = None,
    sizes: tuple[int, ...] = SIZES,
    repeats: int = 9,
    pick: Callable[[Sequence[float]], float] = median,
    warmups: int = 1,
) -> Cost:
    """Measure the time of a pass at each size, in turns, so that drift affects all alike.

    The tree is binary. Weights and shapes decide the time, not tokens; they are arbitrary.

    Args:
        engine: runs the passes.
        context: committed positions before the tree; None takes `context_for`.
        sizes: increasing numbers of nodes, root included.
        repeats: passes at each size that count.
        pick: chooses one of the times of a size, e.g. `min`.
        warmups: passes at each size before them.
    """
    vocabulary = engine.config.vocab_size
    length = context_for(engine) if context is None else context
    sequence = engine.start((np.arange(length) % vocabulary).astype(np.int32))
    trees = {n: _binary(n, vocabulary) for n in sizes}
    seconds: dict[int, list[float]] = {n: [] for n in sizes}
    try:
        for repeat in range(warmups + repeats):
            for n, tree in trees.items():
                start = perf_counter()
                engine.forward([(sequence, tree)])
                if repeat >= warmups:
                    seconds[n].append(perf_counter() - start)
    finally:
        engine.release(sequence)
    return Cost(tuple(sizes), tuple(pick(seconds[n]) for n in sizes))


def context_for(engine: Engine) -> int:
    """Return the number of committed positions at which `measure_cost` measures."""
    return min(CONTEXT, engine.config.context // 2)


def _binary(n: int, vocabulary: int) -> TokenTree:
    nodes = np.arange(n)
    origin = np.zeros(n, np.int16)
    origin[0] = -1
    return TokenTree(
        (nodes % vocabulary).astype(np.int32),
        ((nodes + 1) // 2 - 1).astype(np.int32),
        np.ones(n, np.float32),
        origin,
    )
