"""Rows that are drawn: the floor that every other policy has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.core import Exactness
from paceline.kvcache.base import LayerCache, Scores, ScoringPolicy
from paceline.registry import check_range, kv_policies


@kv_policies.register("random", Exactness.LOSSY)
@dataclass(frozen=True)
class RandomRows(ScoringPolicy):
    """Keep rows that are drawn by lot, besides the first and the most recent ones.

    A floor to measure other policies against. The draw of a row depends on the seed, its layer,
    its head and its position alone, so that a row that lost does not come back, and one that won
    stays as long as the budget allows.

    Attributes:
        budget: rows that each head keeps. Default 1024, as of other policies.
        sinks: first positions that are always kept. Default 4.
        every: committed positions between evictions. Default 64.
        recent: last positions, always kept. Default 64, as of policies that read queries.
        seed: of the draws, 0 to 2**31 - 1. Default 0.
    """

    examples = ("random", "random:budget=24,recent=8,every=8")

    recent: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(0, 2**31 - 1, self.name, seed=self.seed)

    def score(self, layer: LayerCache) -> Scores:
        """See `ScoringPolicy.score`."""
        heads, rows = layer.positions.shape
        longest = int(layer.positions.max(initial=0)) + 1
        scores = np.empty((heads, rows))
        for head in range(heads):
            rng = np.random.default_rng([self.seed, layer.index, head])
            scores[head] = rng.random(longest)[layer.positions[head]]
        return scores
