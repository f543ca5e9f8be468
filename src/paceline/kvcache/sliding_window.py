"""Attention sinks and a window of recent positions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.core import Exactness, Tokens
from paceline.kvcache.base import LayerCache, Policy
from paceline.registry import Source, kv_policies


@kv_policies.register("sliding_window", Exactness.LOSSY)
@dataclass(frozen=True)
class SlidingWindow(Policy):
    """Keep the first positions, which models rest attention on, and the most recent ones.

    Attention over a window alone breaks down once the first positions leave it; with a few of
    them kept it does not. Costs nothing per token. Everything in between is forgotten, so that a
    question about it cannot be answered. Whenever it acts, rows beyond `sinks` and the last
    `budget - sinks` positions are dropped.

    Attributes:
        budget: rows that each head keeps. Default 1024: what small models use well.
        sinks: first positions kept. Default 4, as in the paper.
        every: committed positions between evictions. Default 64: one page of the cache.
    """

    source = Source(
        authors="Xiao et al.",
        title="Efficient Streaming Language Models with Attention Sinks",
        arxiv="2309.17453",
        section="section 3.2",
        note="positions stay those of the text, where the paper numbers them within the cache",
    )
    examples = ("sliding_window", "sliding_window:budget=24,sinks=2,every=8")

    def keep(self, layer: LayerCache) -> Tokens:
        """See `Policy.keep`."""
        heads, held = layer.positions.shape
        rows = np.r_[: self.sinks, held - self.budget + self.sinks : held]
        return np.tile(rows.astype(np.int32), (heads, 1))
