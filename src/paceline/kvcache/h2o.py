"""Heavy hitters: the rows that received most attention."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.abilities import Ability
from paceline.core import Exactness
from paceline.kvcache.base import LayerCache, Scores, ScoringPolicy
from paceline.registry import Source, kv_policies


@kv_policies.register("h2o", Exactness.LOSSY)
@dataclass(frozen=True)
class H2O(ScoringPolicy):
    """Keep the most attended and the most recent positions of every KV head.

    A few positions receive most of the attention, and go on receiving it. Each row's attention is
    summed over all positions so far; the rows with the largest sums stay beside the recent ones.
    Heads choose for themselves. Summing costs the scores of each committed position once more.

    Attributes:
        budget: rows that each head keeps. Default 1024: what small models use well.
        sinks: first positions that are kept whatever attention they received. Default 0: they
            receive most of it.
        every: committed positions between evictions. Default 64: one page of the cache.
        recent: last positions, kept although they had little time to receive attention. Default
            512: half of the budget, as in the paper.
    """

    source = Source(
        authors="Zhang et al.",
        title="H2O: Heavy-Hitter Oracle for Efficient Generative Inference",
        arxiv="2306.14048",
        section="algorithm 1",
        note="evicts at multiples of `every` instead of at each token, and while reading a prompt",
    )
    catalogue = (22,)
    needs = frozenset({Ability.EVICT, Ability.ATTENTION_MASS})
    examples = ("h2o", "h2o:budget=24,recent=8,every=8")

    sinks: int = 0

    def score(self, layer: LayerCache) -> Scores:
        """See `ScoringPolicy.score`."""
        return layer.attention_mass
