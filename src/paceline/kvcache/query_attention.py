"""The attention that the last queries of a layer give to its rows."""

from __future__ import annotations

import numpy as np

from paceline.kvcache.base import LayerCache, Scores


def query_attention(layer: LayerCache, window: int) -> Scores:
    """Return the attention of the last `window` positions, float64 [H, W, S].

    Each position sees itself and what lies before it, as far as the layer's own window allows. Rows
    that a head does not hold get none.

    Args:
        layer: with keys and queries.
        window: positions; fewer where fewer queries are kept.
    """
    assert layer.queries is not None
    assert layer.keys is not None
    assert layer.config is not None
    shape, cap = layer.shape, layer.config.attention_softcap
    queries = layer.queries[:, -window:]
    groups = shape.heads // shape.kv_heads
    grouped = queries.reshape(shape.kv_heads, -1, queries.shape[-1])  # [H_kv, groups * W, D]
    scores = (grouped @ layer.keys.transpose(0, 2, 1)).astype(np.float64)
    if cap is not None:
        scores = np.tanh(scores / cap) * cap
    count = queries.shape[1]
    scores = scores.reshape(shape.kv_heads, groups, count, -1)
    own = np.arange(layer.length - count, layer.length)
    distance = own[:, None] - layer.positions[:, None, None, :]  # [H_kv, 1, W, S]
    hidden = (distance < 0) | (layer.positions < 0)[:, None, None]
    hidden |= ~shape.near(distance, layer.positions[:, None, None, :])
    scores = np.where(hidden, -np.inf, scores)
    scores -= scores.max(-1, keepdims=True)
    shares = np.exp(scores)
    shares /= shares.sum(-1, keepdims=True)
    result: Scores = shares.reshape(shape.heads, count, -1)
    return result
