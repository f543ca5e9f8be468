"""Retrieval heads keep everything, the others the beginning and the end."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from paceline.abilities import Ability
from paceline.core import Exactness
from paceline.engines.base import Cached, Engine
from paceline.errors import MemoryFullError, MethodError
from paceline.kvcache.base import (
    LayerCache,
    LayerCaches,
    Scores,
    attention_layers,
    best_rows,
)
from paceline.kvcache.expected_attention import ExpectedAttention
from paceline.kvcache.query_attention import query_attention
from paceline.registry import Source, check_range, kv_policies

_PROBES = 3
_REPEATED = 96  # random tokens of a probe, which come twice
_ranks: WeakKeyDictionary[Engine, list[NDArray[np.int64]]] = WeakKeyDictionary()


@kv_policies.register("retrieval_heads", Exactness.LOSSY)
@dataclass(frozen=True)
class RetrievalHeads(ExpectedAttention):
    """Spend much of the budget of all heads on those that look things up.

    A few heads attend to what followed an earlier occurrence of the current token; with them a
    model copies, and finds what it is asked for. A probe tells which: random tokens that come
    twice, run once for each engine, in which a head's rank is the attention that it gives to what
    followed before. Heads keep all rows in the order of their rank as long as `share` of the
    budget of all heads of all layers lasts; the others keep the rows with the best product of
    what `expected_attention` and `sirllm` score: where coming queries look, and what the model
    could not have guessed. Which heads keep all does not depend on the text, only on its length:
    their number falls while a text grows.

    Heads attend to the rows that they hold alone, which is what the policy saves. A page of the
    cache holds rows of all heads, so that memory follows the largest one and does not fall.

    Attributes:
        budget: rows that a head keeps on average over the model. Default 1024.
        sinks: first positions that all heads keep. Default 4.
        every: committed positions between evictions. Default 64.
        recent: last positions that all heads keep. Default 64.
        window: last positions whose queries count, 2 to 4096. Default 256.
        future: coming positions over which rotations are averaged, 1 to 65536. Default 512.
        epsilon: added to each share before it is multiplied by the norm, 0 to 1. Default 0.01.
        share: of the budget, for heads that keep all, 0 to 1. Default 0.5.
        surprise: power of the surprisal in the product, 0 to 16. Default 3: on SmolLM2 copies keep
            more than with 1.
    """

    source = Source(
        authors="Wu et al.",
        title="Retrieval Head Mechanistically Explains Long-Context Factuality",
        arxiv="2404.15574",
        section="section 2",
        note="the notion; the probe and the budget that all heads share are ours",
    )
    needs = ExpectedAttention.needs | {Ability.SURPRISAL}
    examples = ("retrieval_heads", "retrieval_heads:budget=24,recent=8,every=8,window=16")

    share: float = 0.5
    surprise: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(0.0, 1.0, self.name, share=self.share)
        check_range(0.0, 16.0, self.name, surprise=self.surprise)

    def score(self, layer: LayerCache) -> Scores:
        """See `ScoringPolicy.score`."""
        assert layer.surprisal is not None
        return super().score(layer) * layer.surprisal[layer.positions] ** self.surprise

    def max_rows(self, length: int) -> int:
        """Return `length`: some heads keep all."""
        return length

    def check(self, engine: Engine) -> None:
        """Refuse, besides what others do, a model that sees too little; and run the probe.

        Where there is no room for it now, it is run when the policy first acts.

        Raises:
            MethodError: as said.
        """
        super().check(engine)
        if engine.config.context < 2 * _REPEATED:
            raise MethodError(
                f"{self.name} needs a model that sees {2 * _REPEATED} tokens, found "
                f"{engine.config.context}; take another KV policy, e.g. expected_attention"
            )
        with suppress(MemoryFullError):
            retrieval_ranks(engine)

    def act(self, engine: Engine, sequence: Cached) -> bool:
        """Evict rows if this is the length to do it; see `Policy.act`."""
        if sequence.length % self.every or sequence.length <= self.budget:
            return False
        sizes = self._sizes(engine, sequence.length)
        layers = LayerCaches(self.required, engine, sequence)
        kept = [
            best_rows(layer.positions, self.final_scores(layer), sizes[layer.index])
            for layer in layers
        ]
        engine.evict(sequence, layers.all_layers(kept))
        return True

    def _sizes(self, engine: Engine, length: int) -> list[NDArray[np.int64]]:
        """Return how many rows each head of each layer keeps of a text of `length` tokens."""
        ranks = retrieval_ranks(engine)
        base = self.sinks + self.recent
        total = (self.budget - base) * len(ranks)  # rows besides those that all keep
        left = self.share * total
        whole: list[tuple[NDArray[np.int64], int]] = []
        for rank in ranks:
            layer = engine.config.layers[rank[0]]
            near = length if layer.window is None else min(length, layer.window + layer.sinks)
            seen = max(base, near)
            if seen - base > left:
                break
            left -= seen - base
            whole.append((rank, seen))
        others = max(1, len(ranks) - len(whole))
        rest = base + int(((1 - self.share) * total + left) // others)
        sizes = [np.full(layer.kv_heads, rest) for layer in engine.config.layers]
        for (layer, head), seen in whole:
            sizes[layer][head] = seen
        return sizes


def retrieval_ranks(engine: Engine) -> Sequence[NDArray[np.int64]]:
    """Return layer and KV head [2] of all heads, those first that look up what followed before.

    Raises:
        MemoryFullError: there is no room for the probe, which is run once for an engine.
    """
    known = _ranks.get(engine)
    if known is None:
        scores = np.mean([_probe(engine, seed) for seed in range(_PROBES)], axis=0)
        heads = [
            np.array([index, head])
            for index, layer in enumerate(engine.config.layers)
            for head in range(layer.kv_heads)
        ]
        known = _ranks[engine] = [heads[place] for place in np.argsort(-scores, kind="stable")]
    return known


def _probe(engine: Engine, seed: int) -> NDArray[np.float64]:
    """Return the attention of each KV head, [all heads], to what followed a token before."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, engine.config.vocab_size, _REPEATED).astype(np.int32)
    sequence = engine.open()
    try:
        engine.track_queries(sequence, _REPEATED)
        engine.extend(sequence, np.tile(tokens, 2))
        scores = []
        for index in attention_layers(engine.config):
            layer = engine.config.layers[index]
            cache = LayerCache(
                index,
                len(engine.config.layers),
                sequence.length,
                engine.rows(sequence, index),
                keys=engine.keys_values(sequence, index)[0],
                queries=engine.recent_queries(sequence, index),
                config=engine.config,
            )
            shares = query_attention(cache, _REPEATED)  # [H, W, S]
            after = np.arange(_REPEATED)
            found = shares[:, after, after + 1].mean(1).reshape(layer.kv_heads, -1)
            scores.append(found.max(1))
        return np.concatenate(scores)
    finally:
        engine.release(sequence)
