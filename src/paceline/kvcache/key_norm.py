"""Small keys: rows by the norm of their key."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.abilities import Ability
from paceline.core import Exactness
from paceline.kvcache.base import LayerCache, Scores, ScoringPolicy
from paceline.registry import Source, kv_policies


@kv_policies.register("knorm", Exactness.LOSSY)
@dataclass(frozen=True)
class KeyNorm(ScoringPolicy):
    """Keep the rows whose keys have the smallest norm.

    Keys with a small norm tend to receive much attention. Needs no queries and no attention.

    Attributes:
        budget: rows that each head keeps. Default 1024, as of other policies.
        sinks: first positions that are always kept. Default 4.
        every: committed positions between evictions. Default 64.
        recent: last positions, always kept. Default 64, as of policies that read queries.
    """

    source = Source(
        authors="Devoto et al.",
        title="A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
        arxiv="2406.11430",
        section="section 3",
        note="in all layers; the paper leaves the first two alone",
    )
    needs = frozenset({Ability.EVICT, Ability.KEYS})
    examples = ("knorm", "knorm:budget=24,recent=8,every=8")

    recent: int = 64

    def score(self, layer: LayerCache) -> Scores:
        """See `ScoringPolicy.score`."""
        assert layer.keys is not None
        norms: Scores = np.linalg.norm(layer.keys.astype(np.float64), axis=-1)
        return -norms
