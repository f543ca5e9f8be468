"""FastGen: each head keeps what its own pattern of attention needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paceline.abilities import Ability
from paceline.core import Exactness, Tokens
from paceline.kvcache.base import LayerCache, Policy, Scores, pad_rows
from paceline.kvcache.query_attention import query_attention
from paceline.registry import Source, check_range, kv_policies


@kv_policies.register("fastgen", Exactness.LOSSY)
@dataclass(frozen=True)
class FastGen(Policy):
    """Let each head keep special tokens, a window, frequent ones, or all, by its attention.

    When a text outgrows the budget, the attention of the last queries is profiled: a head takes
    the cheapest choice that gives back `recovery` of it. The choices, each with what the ones
    before it keep: the first positions; a window of the last positions; the positions that receive
    most; all. The choice stays for the rest of the text. Heads attend to the rows that they hold
    alone. A page of the cache holds rows of all heads, so that memory follows the largest one.

    Attributes:
        budget: rows that a head keeps that takes the window and frequent ones. Default 1024.
        sinks: first positions, in the place of special tokens; 1 at least. Default 4.
        every: committed positions between evictions. Default 64.
        window: last positions that all choices but the first keep. Default 256.
        recovery: share of attention that a choice must give back, 0 to 1. Default 0.95.
    """

    source = Source(
        authors="Ge et al.",
        title="Model Tells You What to Discard: Adaptive KV Cache Compression for LLMs",
        arxiv="2310.01801",
        section="section 3",
        note="special tokens are the first positions; no choice keeps punctuation; heads are "
        "profiled by the last queries where the text outgrows the budget",
    )
    catalogue = (272,)
    missing = {272: "a choice that keeps punctuation, which needs the text of tokens"}
    needs = frozenset({Ability.EVICT, Ability.KEYS, Ability.QUERIES})
    examples = ("fastgen", "fastgen:budget=24,every=8,sinks=2,window=8,recovery=0.7")

    window: int = 256
    recovery: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(1, self.budget - 2, self.name, sinks=self.sinks)
        check_range(1, self.budget - self.sinks - 1, self.name, window=self.window)
        check_range(0.0, 1.0, self.name, recovery=self.recovery)

    @property
    def query_window(self) -> int:
        """Last positions whose queries are read."""
        return self.window

    def max_rows(self, length: int) -> int:
        """Return `length`: some heads may keep all."""
        return length

    def keep(self, layer: LayerCache) -> Tokens:
        """Return what each head's choice keeps."""
        shares = query_attention(layer, self.window).mean(1)
        shares = shares.reshape(len(layer.positions), -1, shares.shape[-1]).mean(1)  # [H_kv, S]
        kept = []
        for positions, own in zip(layer.positions, shares, strict=True):
            choices = self._choices(positions, own, layer.length)
            before = int(((positions >= 0) & (positions < layer.length - self.every)).sum())
            sizes = [self.sinks, self.sinks + self.window, self.budget]
            if before in sizes:  # the choice was made earlier
                choice = sizes.index(before)
            elif layer.length - self.every > self.budget:
                choice = 3
            else:
                recovered = [float(own[rows].sum()) for rows in choices]
                choice = int(np.argmax(np.array([*recovered[:3], np.inf]) >= self.recovery))
            kept.append(choices[choice])
        return pad_rows(kept)

    def _choices(self, positions: Tokens, shares: Scores, length: int) -> list[NDArray[np.int32]]:
        """Return the rows of each choice of a head, cheapest first."""
        held = positions >= 0
        first = held & (positions < self.sinks)
        near = held & (positions >= length - self.window)
        scores = np.where(held, shares, -np.inf)
        scores[first | near] = np.inf
        best = np.sort(np.argsort(-scores, kind="stable")[: self.budget])
        choices = (np.flatnonzero(first), np.flatnonzero(first | near), best, np.flatnonzero(held))
        return [rows.astype(np.int32) for rows in choices]
