"""What choices of a `FewRead` need of a sequence besides its keys, in torch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Clusters:
    """Keys of a prompt in clusters, for each KV head.

    Attributes:
        prompt: positions of the prompt that are clustered: its whole runs.
        labels: cluster of each key, int64 [G, P].
        centroids: mean key of each cluster, [G, C, D].
        parents: cluster of each centroid, int64 [G, C]; None where there is one level.
        tops: centroids of these, [G, B, D].
    """

    prompt: int
    labels: Tensor
    centroids: Tensor
    parents: Tensor | None = None
    tops: Tensor | None = None


@dataclass(eq=False)
class ReadMemory:
    """Queries and clusters of one sequence.

    Attributes:
        keeps_queries: whether queries are kept at all.
        queries: of the committed positions by layer, [H, S, D], rotated and scaled.
        pending: those of the nodes of the last pass.
        clusters: of the prompt, by layer.
    """

    keeps_queries: bool
    queries: dict[int, Tensor] = field(default_factory=dict)
    pending: dict[int, Tensor] = field(default_factory=dict)
    clusters: dict[int, Clusters] = field(default_factory=dict)

    def note(self, layer: int, queries: Tensor) -> None:
        """Take the queries [H, N, D] of the nodes of a pass."""
        if self.keeps_queries:
            self.pending[layer] = queries

    def all_queries(self, layer: int) -> Tensor:
        """Return the queries of the committed positions and of the nodes, [H, S + N, D]."""
        pending = self.pending[layer]
        known = self.queries.get(layer)
        return pending if known is None else torch.cat([known, pending], 1)

    def commit(self, nodes: Tensor) -> None:
        """Keep the queries of `nodes` int64 [A]."""
        for layer, pending in self.pending.items():
            known = self.queries.get(layer)
            own = pending[:, nodes]
            self.queries[layer] = own if known is None else torch.cat([known, own], 1)
        self.pending = {}

    def truncate(self, length: int) -> None:
        """Forget what depends on positions from `length` on."""
        self.queries = {layer: known[:, :length] for layer, known in self.queries.items()}
        self.clusters = {i: known for i, known in self.clusters.items() if known.prompt <= length}
        self.pending = {}

    def fork(self) -> ReadMemory:
        """Return an independent copy; tensors are shared, as none is changed in place."""
        return ReadMemory(self.keeps_queries, dict(self.queries), {}, dict(self.clusters))
