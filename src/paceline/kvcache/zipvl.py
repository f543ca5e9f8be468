"""ZipVL's ratio: each layer keeps as many rows as hold most of its attention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.abilities import Ability
from paceline.core import Exactness, Tokens
from paceline.kvcache.base import LayerCache, Policy
from paceline.kvcache.query_attention import query_attention
from paceline.registry import Source, check_range, kv_policies


@kv_policies.register("zipvl", Exactness.LOSSY)
@dataclass(frozen=True)
class ZipVL(Policy):
    """Let each layer keep the fewest rows that receive `share` of its attention.

    A row's score is the mean attention of those of the last queries that see it, over all heads of
    the layer, which keep the same positions. Layers whose attention is concentrated keep few rows,
    others up to the budget. What the paper stores at few bits is dropped here, as the cache has one
    format, and prompts are read with all rows.

    Attributes:
        budget: most rows that a layer keeps. Default 1024, as of other policies.
        sinks: first positions that are always kept. Default 4.
        every: committed positions between evictions. Default 64.
        recent: last positions, always kept. Default 64.
        share: of a layer's attention that the kept rows receive, 0 to 1. Default 0.975, as in the
            paper.
        window: last positions whose queries tell, 1 to 4096. Default 64.
    """

    source = Source(
        authors="He et al.",
        title="ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification",
        arxiv="2410.08584",
        section="section 4.1",
        note="the ratio alone: unimportant rows are dropped instead of stored at few bits",
    )
    catalogue = (307,)
    missing = {
        307: "rows of less importance stored at few bits; prompts read with important rows only"
    }
    needs = frozenset({Ability.EVICT, Ability.KEYS, Ability.QUERIES})
    examples = ("zipvl", "zipvl:budget=24,recent=8,every=8,share=0.9,window=8")

    recent: int = 64
    share: float = 0.975
    window: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(0, self.budget - self.sinks, self.name, recent=self.recent)
        check_range(0.0, 1.0, self.name, share=self.share)
        check_range(1, 4096, self.name, window=self.window)

    @property
    def query_window(self) -> int:
        """Last positions whose queries are read."""
        return self.window

    def keep(self, layer: LayerCache) -> Tokens:
        """Return the same rows for all heads: those that are always kept, and the best others."""
        positions = layer.positions[0]
        shares = query_attention(layer, self.window).mean(0)  # [W, S]
        own = np.arange(layer.length - len(shares), layer.length)
        seen = np.maximum((own[:, None] >= positions).sum(0), 1)
        scores = shares.sum(0) / seen
        always = (positions < self.sinks) | (positions >= layer.length - self.recent)
        order = np.argsort(-np.where(always, np.inf, scores), kind="stable")
        received = np.cumsum(scores[order]) / scores.sum()
        count = int(np.searchsorted(received, self.share)) + 1
        count = min(max(count, int(always.sum())), self.budget, len(order))
        return np.tile(np.sort(order[:count]).astype(np.int32), (len(layer.positions), 1))
