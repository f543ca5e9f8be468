"""Dual Chunk Attention: distances beyond the trained ones become trained ones.

Keys are turned by their position within their chunk. A query is turned likewise for keys of its own
chunk, by one chunk more, up to the last trained position, for those of the chunk before, and by the
last trained position for all earlier ones.

Based on An et al., Training-Free Long-Context Scaling of Large Language Models, arXiv 2402.17463,
section 3, which Qwen2.5-1M (arXiv 2501.15383, section 5.1) extends the context by.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from paceline.models.blocks import rotate, softcap
from paceline.models.config import ModelConfig
from paceline.models.rope import Rope


def score_change(
    queries: Tensor, keys: Tensor, at: Tensor, held: Tensor, rope: Rope, config: ModelConfig
) -> Tensor:
    """Return what to add to scores of rows in earlier chunks, float32 [H, N, S].

    Args:
        queries: [H, N, D], turned by their positions within their chunks.
        keys: [G, S, D], likewise.
        at: int64 [N], positions of the queries.
        held: int64 [S], positions of the rows.
        rope: of the layer, whose parameters are `chunk` and `length`.
        config: has scale and cap of the scores.
    """
    sizes = dict(rope.parameters)
    chunk, last = int(sizes["chunk"]), int(sizes["length"]) - 1
    inside = at % chunk
    behind = (at // chunk)[:, None] - (held // chunk)[None]  # chunks in between, [N, S]
    if int(behind.max()) < 1:
        return torch.zeros(1, device=at.device)
    plain = replace(rope, scaling="default", parameters=())
    cos, sin = (torch.from_numpy(table).to(at.device) for table in plain.table(0, last + 1))
    wide = keys.repeat_interleave(len(queries) // len(keys), 0).mT

    def scores(turned: Tensor) -> Tensor:
        products = (turned @ wide).float() * config.attention_scale
        return softcap(products, config.attention_softcap)

    def change(target: Tensor) -> Tensor:
        further = target - inside
        return scores(rotate(queries, cos[further], sin[further], rope.adjacent)) - own

    own = scores(queries)
    near = change((inside + chunk).clamp(max=last))
    far = change(torch.full_like(inside, last))
    return torch.where(behind == 1, near, torch.where(behind > 1, far, 0.0))
