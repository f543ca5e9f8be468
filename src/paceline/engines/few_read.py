"""How much of the cache attention reads where it reads few of the cached positions."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

RUN = 16  # positions that are chosen together


class HeadRead(IntEnum):
    """What one KV head of a layer reads."""

    ALL = 0  # every position
    CHOSEN = 1  # the first and the last positions, and the best in between
    NEAR = 2  # the first and the last positions alone


@dataclass(frozen=True, slots=True)
class FewRead:
    """How positions are chosen, in aligned runs of 16.

    Every node and KV head chooses for itself, by the node's query and the keys before it, so that
    trees, chunks and batches change nothing.

    Attributes:
        summary: by what runs are compared with a query: `mean` of their keys, `bounds` of each
            dimension, or `none`.
        top_k: score every key; each query head reads the values of the best positions.
        sinks: first runs, which are always read.
        local: last runs, the query's own included, which are always read; at least 1. A tree that
            branches must end within them.
        least: runs that are read at least, those included.
        share: of the runs that a query sees, how many are read, those included; the larger of the
            two counts.
    """

    summary: str = "mean"
    top_k: bool = False
    sinks: int = 1
    local: int = 4
    least: int = 0
    share: float = 0.1
