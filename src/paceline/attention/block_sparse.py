"""Block-sparse prefill: blocks of a prompt read the blocks that a few of their queries look at."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.attention.base import PrefillPattern
from paceline.core import Exactness
from paceline.engines.sparse_prefill import SparsePrefill
from paceline.registry import Source, check_range, patterns


@patterns.register("block_sparse", Exactness.LOSSY)
@dataclass(frozen=True)
class BlockSparse(PrefillPattern):
    """Read a prompt faster: each block of 64 queries reads the blocks that hold its attention.

    A few queries of each block are compared with all keys. In each head the block then reads the
    blocks of 64 positions that hold `threshold` of their attention, those with most first, besides
    the first and the last ones. Decoding reads everything, and so do the last tokens of a prompt
    behind its last whole block. Within a block, what a token reads depends on tokens behind it.

    Attributes:
        threshold: share of the sampled attention that chosen blocks hold, 0 to 1. Default 0.92.
        samples, sinks, local, dense: as of `PrefillPattern`.
    """

    source = Source(
        authors="Xu et al.",
        title="XAttention: Block Sparse Attention with Antidiagonal Scoring",
        arxiv="2503.16428",
        section="2",
        note="blocks up to a threshold of attention, as there; the attention of sampled queries "
        "predicts it better than antidiagonal sums do at equal cost, and needs no second kernel",
    )
    catalogue = ()
    examples = ("block_sparse", "block_sparse:threshold=0.8,samples=2,local=1")

    threshold: float = 0.92

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(0, 1, self.name, threshold=self.threshold)

    @property
    def sparse_prefill(self) -> SparsePrefill:
        """See `PrefillPattern`."""
        return SparsePrefill(self.samples, self.threshold, self.sinks, self.local, self.dense)
