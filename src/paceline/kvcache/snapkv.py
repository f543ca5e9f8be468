"""SnapKV: rows by the attention of an observation window, smoothed over their neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.abilities import Ability
from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.kvcache.base import LayerCache, Scores, ScoringPolicy
from paceline.kvcache.query_attention import query_attention
from paceline.registry import Source, check_range, kv_policies


@kv_policies.register("snapkv", Exactness.LOSSY)
@dataclass(frozen=True)
class SnapKV(ScoringPolicy):
    """Keep what the last positions attend to, pooled so that neighbours stay together.

    The attention that each row receives from the observation window is averaged over the window,
    smoothed over neighbouring rows, and averaged over the query heads of a group. Best where the
    question stands at the end of what is compressed.

    Attributes:
        budget: rows that each head keeps. Default 1024, as of other policies.
        sinks: first positions that are always kept. Default 0, as in the paper.
        every: committed positions between evictions. Default 64.
        recent: last positions, always kept; they are the observation window. Default 64.
        pool: rows over which attention is averaged, odd, 1 to 101. Default 5.
    """

    source = Source(
        authors="Li et al.",
        title="SnapKV: LLM Knows What You are Looking for Before Generation",
        arxiv="2404.14469",
        section="section 4",
        note="acts at multiples of `every`, too, while text is generated",
    )
    needs = frozenset({Ability.EVICT, Ability.KEYS, Ability.QUERIES})
    examples = ("snapkv", "snapkv:budget=24,recent=8,every=8,pool=3")

    sinks: int = 0
    recent: int = 64
    pool: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(1, self.budget, self.name, recent=self.recent)
        check_range(1, 101, self.name, pool=self.pool)
        if self.pool % 2 == 0:
            raise MethodError(f"{self.name}:pool is {self.pool}, expected an odd number")

    @property
    def query_window(self) -> int:
        """Last positions whose queries are read."""
        return self.recent

    def score(self, layer: LayerCache) -> Scores:
        """See `ScoringPolicy.score`."""
        shares = query_attention(layer, self.recent).mean(1)  # [H, S]
        heads, rows = layer.positions.shape
        window = layer.positions >= layer.length - self.recent  # always kept
        before = rows - int(window[0].sum())
        pooled = smoothed(shares[:, :before], self.pool)
        scores = np.full((heads, rows), np.inf)
        scores[:, :before] = pooled.reshape(heads, -1, before).mean(1)
        return scores


def smoothed(values: Scores, size: int) -> Scores:
    """Return means over `size` neighbours along the last axis, zeros beyond the ends."""
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(size // 2, size // 2)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, size, axis=-1)
    result: Scores = windows.mean(-1)
    return result
