"""Which tokens of a document depend on what stands before it: those are worth computing again.

After Cache-Craft (Agarwal et al. 2025), section 3: a token whose attention goes to other chunks has
keys and values that were computed wrong apart; a small share of such tokens, computed again behind
their neighbours, gives most of the quality back. There the attention is recorded when a chunk is
computed in its first prompt. Here a chunk is computed alone, and its stored queries are compared
with the keys that stand before it in the prompt at hand.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.documents.chunk import Chunk, moved
from paceline.models.config import ModelConfig

RUN = 16  # tokens that are computed again together, as one pass costs much more than one token


def cross_attention(
    chunk: Chunk, config: ModelConfig, position: int, sink: int, before: Mapping[int, Floats]
) -> NDArray[np.float32]:
    """Return the share of attention that each token gives to what stands before its document.

    Attention to the first tokens of the prompt does not count: everything attends to these.

    Args:
        chunk: the document.
        config: the model's shape.
        position: of its first token in the prompt.
        sink: first positions of the prompt that do not count.
        before: rotated keys [H_kv, S, D] of all positions before it, of each layer of
            `chunk.queries`.

    Returns:
        float32 [N], mean over heads and layers.
    """
    total = np.zeros(len(chunk), np.float32)
    for index, stored in chunk.queries.items():
        layer = config.layers[index]
        queries = moved(layer, stored, position - chunk.start)
        keys = moved(layer, chunk.keys[index], position - chunk.start)
        grouped = queries.reshape(layer.kv_heads, -1, layer.head_dim)  # [H_kv, G * N, D]
        outer = grouped @ before[index].transpose(0, 2, 1)
        inner = grouped @ keys.transpose(0, 2, 1)
        size = len(chunk)
        causal = np.tril(np.ones((size, size), np.bool_))
        inner = np.where(causal, inner.reshape(layer.kv_heads, -1, size, size), -np.inf)
        outer = outer.reshape(layer.kv_heads, -1, size, outer.shape[-1])
        top = np.maximum(outer.max(-1, initial=-np.inf), inner.max(-1))[..., None]
        outer, inner = np.exp(outer - top), np.exp(inner - top)
        share = outer[..., sink:].sum(-1) / (outer.sum(-1) + inner.sum(-1))
        total += share.mean((0, 1))
    return np.asarray(total / max(len(chunk.queries), 1), np.float32)


def recomputed_runs(
    scores: NDArray[np.float32], share: float, run: int = RUN
) -> list[tuple[int, int]]:
    """Return the runs of tokens with the highest mean scores, in order, as (start, stop).

    Args:
        scores: float32 [N].
        share: of all tokens that the runs are to hold, to the nearest whole run, at least one.
        run: tokens of a run.
    """
    size = len(scores)
    starts = np.arange(0, size, run)
    count = max(1, round(share * len(starts))) if share > 0 else 0
    means = np.add.reduceat(scores, starts) / np.minimum(run, size - starts)
    best = np.sort(np.argsort(-means, kind="stable")[:count]) * run
    runs: list[tuple[int, int]] = []
    for start in best.tolist():
        stop = min(start + run, size)
        if runs and runs[-1][1] == start:
            runs[-1] = runs[-1][0], stop
        else:
            runs.append((start, stop))
    return runs
