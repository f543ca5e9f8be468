"""HiP: a tree search for the runs of keys that fit a block of queries best."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.attention.base import PrefillPattern
from paceline.core import Exactness
from paceline.engines.sparse_prefill import LEAF, HeadRule, PrefillRule, SparsePrefill
from paceline.registry import Source, check_range, patterns


@patterns.register("hip", Exactness.LOSSY)
@dataclass(frozen=True)
class HiP(PrefillPattern):
    """Find what a block of a prompt's queries reads by halving ranges of keys, the best on.

    The keys between the first and the last blocks are divided into equal ranges of runs of 16, as
    many as runs are read. Each range is halved; of all halves those are kept whose middle run has
    the largest score with any of the block's sampled queries, and so on down to single runs. The
    time to choose grows with the logarithm of the length. Ranges are read as far as they are
    found; no position is excluded for good.

    Attributes:
        keys: positions that a block finds so, in runs of 16, besides the first and the last blocks.
            Default 512, as in the paper.
        samples, sinks, local, dense: as of `PrefillPattern`.
    """

    source = Source(
        authors="Lee et al.",
        title="A Training-free Sub-quadratic Cost Transformer Model Serving Framework with "
        "Hierarchically Pruned Attention",
        arxiv="2406.09827",
        section="3",
        note="leaves are runs of 16 keys, and the middle run stands for a range in place of its "
        "middle key: the cache gives 16 scores at the cost of one; a few queries of a block choose",
    )
    catalogue = (296,)
    missing = {296: "decoding, and keys that are moved out of fast memory"}
    examples = ("hip", "hip:keys=64,samples=2,local=1")

    keys: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(LEAF, 1 << 24, self.name, keys=self.keys)

    @property
    def sparse_prefill(self) -> SparsePrefill:
        """See `PrefillPattern`."""
        every = HeadRule(PrefillRule.TREE, -(-self.keys // LEAF))
        return SparsePrefill(self.samples, 1.0, self.sinks, self.local, self.dense, every)
