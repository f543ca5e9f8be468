"""Which blocks of nested matrices are loaded into a given memory."""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from paceline.arguments import check_size

_WIDTH = re.compile(r"([1-8]) ?bits?")


@dataclass(frozen=True)
class Width:
    """Bits of the codes that are loaded, instead of a memory.

    Attributes:
        bits: of a code.
    """

    bits: int


@dataclass(frozen=True)
class NestedSizes:
    """What the first blocks of a matrix take, and what they miss.

    Attributes:
        sizes: bytes of the first block, of the first two, and so on.
        losses: shares of the output's energy that are missed with as many.
    """

    sizes: Sequence[int]
    losses: Sequence[float]


def choose_blocks(matrices: Mapping[str, NestedSizes], room: int) -> dict[str, int] | None:
    """Return how many blocks of each matrix fit, or None where not even the first of all do.

    Every matrix has its first block. Then the block that saves most for each byte is taken next,
    among those that follow the ones that are taken; one that does not fit ends its matrix.

    Args:
        matrices: by name.
        room: bytes for all of them.
    """
    counts = dict.fromkeys(matrices, 1)
    room -= sum(matrix.sizes[0] for matrix in matrices.values())
    if room < 0:
        return None
    queue = [step for name in matrices for step in _next(name, matrices[name], 1)]
    heapq.heapify(queue)
    while queue:
        _, name, size = heapq.heappop(queue)
        if size <= room:
            room -= size
            counts[name] += 1
            for step in _next(name, matrices[name], counts[name]):
                heapq.heappush(queue, step)
    return counts


def _next(name: str, matrix: NestedSizes, count: int) -> list[tuple[float, str, int]]:
    """Return the block after the first `count`: what it saves for each byte, negated; its size."""
    if count == len(matrix.sizes):
        return []
    size = matrix.sizes[count] - matrix.sizes[count - 1]
    saved = matrix.losses[count - 1] - matrix.losses[count]
    return [(-saved / max(size, 1), name, size)]


def parse_memory(name: str, value: object) -> int | Width:
    """Return bytes, given as an integer or as text such as `80MB`, or the width in `4bits`.

    Raises:
        RequestError: it is none of these.
    """
    if isinstance(value, str) and (match := _WIDTH.fullmatch(value.strip())):
        return Width(int(match[1]))
    return check_size(name, value)
