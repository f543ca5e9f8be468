"""TOVA: rows by the attention of the last query, one choice for all heads of a layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.abilities import Ability
from paceline.core import Exactness
from paceline.kvcache.base import LayerCache, Scores, ScoringPolicy
from paceline.kvcache.query_attention import query_attention
from paceline.registry import Source, kv_policies


@kv_policies.register("tova", Exactness.LOSSY)
@dataclass(frozen=True)
class Tova(ScoringPolicy):
    """Keep the positions that the last token attends to most, averaged over a layer's heads.

    Nothing is kept for its place: neither the first positions nor recent ones, unless asked for.
    Rows of a position that only some heads hold are scored where they are held.

    Attributes:
        budget: rows that each head keeps. Default 1024, as of other policies.
        sinks: first positions that are always kept. Default 0, as in the paper.
        every: committed positions between evictions. Default 64.
        recent: last positions, always kept. Default 1: the one that attends.
    """

    source = Source(
        authors="Oren et al.",
        title="Transformers are Multi-State RNNs",
        arxiv="2401.06104",
        section="section 3.2",
        note="acts at multiples of `every` instead of at each token, and while reading a prompt",
    )
    needs = frozenset({Ability.EVICT, Ability.KEYS, Ability.QUERIES})
    examples = ("tova", "tova:budget=24,every=8")

    sinks: int = 0
    recent: int = 1

    def score(self, layer: LayerCache) -> Scores:
        """See `ScoringPolicy.score`."""
        shares = query_attention(layer, 1)[:, 0]  # [H, S]
        mean = shares.mean(0)  # heads of a layer hold the same positions
        return np.tile(mean, (len(layer.positions), 1))
