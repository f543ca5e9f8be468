"""Block-sparse prefill: blocks of a prompt read the blocks that a few of their queries look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from paceline.abilities import Ability
from paceline.attention.base import Pattern
from paceline.core import Exactness
from paceline.engines.sparse_prefill import BLOCK, SparsePrefill
from paceline.registry import Source, check_range, patterns

if TYPE_CHECKING:
    from torch import Tensor


@patterns.register("block_sparse", Exactness.LOSSY)
@dataclass(frozen=True)
class BlockSparse(Pattern):
    """Read a prompt faster: each block of 64 queries reads the blocks that hold its attention.

    A few queries of each block are compared with all keys. In each head the block then reads the
    blocks of 64 positions that hold `threshold` of their attention, those with most first, besides
    the first and the last ones. Decoding reads everything, and so do the last tokens of a prompt
    behind its last whole block. Within a block, what a token reads depends on tokens behind it.

    Attributes:
        threshold: share of the sampled attention that chosen blocks hold, 0 to 1. Default 0.92.
        samples: queries of a block that choose, 1 to 64. Default 4.
        sinks: first blocks that are always read. Default 1.
        local: last blocks that are always read, the query's own included. Default 4.
        dense: first layers that read everything. Default 0.
    """

    needs: ClassVar[frozenset[Ability]] = frozenset()
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
    samples: int = 4
    sinks: int = 1
    local: int = 4
    dense: int = 0

    def __post_init__(self) -> None:
        check_range(0, 1, self.name, threshold=self.threshold)
        check_range(1, BLOCK, self.name, samples=self.samples)
        check_range(0, 1 << 20, self.name, sinks=self.sinks, dense=self.dense)
        check_range(1, 1 << 20, self.name, local=self.local)

    @property
    def sparse_prefill(self) -> SparsePrefill:
        """See `Pattern`."""
        return SparsePrefill(self.samples, self.threshold, self.sinks, self.local, self.dense)

    def mask(
        self, layer: int, queries: Tensor, keys: Tensor, at: Tensor, held: Tensor, chain: bool
    ) -> Tensor:
        """See `Pattern`; of a prompt that ends with the last query."""
        from paceline.engines.choose_blocks import choose_blocks

        prompt = int(at[-1]) + 1
        return choose_blocks(self.sparse_prefill, queries, keys, at, held, prompt, None)
