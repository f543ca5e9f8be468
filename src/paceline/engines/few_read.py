"""How much of the cache attention reads where it reads few of the cached positions."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

RUN = 16  # positions that are chosen together


_REMEMBERING = ("representatives", "centroids")


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
            dimension, `spread` (mean and variance of each dimension), `representatives` (some of
            their keys), or `none`. With `centroids` single positions of a prompt's whole runs are
            chosen by the clusters of their keys.
        top_k: score every key; each query head reads the values of the best positions.
        sinks: first runs, which are always read.
        local: last runs, the query's own included, which are always read; at least 1. A tree that
            branches must end within them.
        least: runs that are read at least, those included.
        share: of the runs that a query sees, how many are read, those included; the larger of the
            two counts.
        representatives: keys of a run that stand for it.
        following: runs behind a run whose queries choose its representatives.
        clusters: centroids for each position of a prompt.
        levels: 2 if clusters are chosen among those of the best clusters of centroids, which hold
            at least twice the positions that are read.
    """

    summary: str = "mean"
    top_k: bool = False
    sinks: int = 1
    local: int = 4
    least: int = 0
    share: float = 0.1
    representatives: int = 0
    following: int = 0
    clusters: float = 0.0
    levels: int = 1

    @property
    def remembers(self) -> bool:
        """Whether choices depend on earlier queries or on what was found of a prompt."""
        return self.summary in _REMEMBERING
