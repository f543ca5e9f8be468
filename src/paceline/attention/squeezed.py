"""Squeezed Attention: the keys of a prompt in clusters, of which queries read the best."""

from __future__ import annotations

from dataclasses import dataclass, replace

from paceline.attention.base import RunPattern
from paceline.core import Exactness
from paceline.engines.few_read import FewRead
from paceline.registry import Source, check_range, patterns


@patterns.register("squeezed", Exactness.LOSSY)
@dataclass(frozen=True)
class Squeezed(RunPattern):
    """Cluster the keys of a prompt once; read single positions of the clusters that fit a query.

    Keys of a prompt's whole runs of 16 are clustered by direction (k-means) when the first token
    behind it is run; forks share the clusters. Each query head reads the positions whose centroids
    have the largest products with its query. What was generated since is always read. The native
    engine copies the prompt's rows cluster by cluster, so that these take their memory twice.

    Attributes:
        clusters: centroids for each position of a prompt, above 0 and up to 1. Default 0.05, as in
            the paper.
        levels: 2 to compare queries with centroids of centroids first; clusters of the best, which
            hold at least twice the positions that are read, are compared then. Default 1.
        share, least, sinks, local, dense: as of `RunPattern`.
    """

    source = Source(
        authors="Hooper et al.",
        title="Squeezed Attention: Accelerating Long Context Length LLM Inference",
        arxiv="2411.09688",
        section="4",
        note="a share of positions in place of a calibrated threshold; the prompt of each request "
        "is its fixed part, and reads itself in full",
    )
    catalogue = (352,)
    missing = {352: "a prompt's own queries, and clusters that are stored with a shared prefix"}
    examples = ("squeezed", "squeezed:clusters=0.1,levels=2,share=0.2,least=0,local=32")

    clusters: float = 0.05
    levels: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(1e-4, 1, self.name, clusters=self.clusters)
        check_range(1, 2, self.name, levels=self.levels)

    @property
    def few_read(self) -> FewRead:
        """See `RunPattern`."""
        return replace(self.rule("centroids"), clusters=self.clusters, levels=self.levels)
