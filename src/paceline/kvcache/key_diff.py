"""Distinctive keys: rows by how little their key resembles the average one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.abilities import Ability
from paceline.core import Exactness
from paceline.kvcache.base import LayerCache, Scores, ScoringPolicy
from paceline.registry import Source, kv_policies

_SMALLEST = 1e-12


@kv_policies.register("keydiff", Exactness.LOSSY)
@dataclass(frozen=True)
class KeyDiff(ScoringPolicy):
    """Keep the rows whose keys differ most from the mean direction of all keys.

    The anchor is the mean of the normalised keys of a head; rows are scored by the negative cosine
    to it. Needs no queries and no attention, and so does not depend on what is asked last.

    Attributes:
        budget: rows that each head keeps. Default 1024, as of other policies.
        sinks: first positions that are always kept. Default 4.
        every: committed positions between evictions. Default 64.
        recent: last positions, always kept. Default 64, as of policies that read queries.
    """

    source = Source(
        authors="Park et al.",
        title="KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in "
        "Resource-Constrained Environments",
        arxiv="2504.15364",
        section="section 3.2",
    )
    needs = frozenset({Ability.EVICT, Ability.KEYS})
    examples = ("keydiff", "keydiff:budget=24,recent=8,every=8")

    recent: int = 64

    def score(self, layer: LayerCache) -> Scores:
        """See `ScoringPolicy.score`."""
        assert layer.keys is not None
        directions = _normalized(layer.keys.astype(np.float64))
        held = (layer.positions >= 0)[:, :, None]
        mean = (directions * held).sum(1, keepdims=True) / held.sum(1, keepdims=True)
        anchor = _normalized(mean)
        scores: Scores = -(directions * anchor).sum(-1)
        return scores


def _normalized(vectors: Scores) -> Scores:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    result: Scores = vectors / np.maximum(norms, _SMALLEST)
    return result
