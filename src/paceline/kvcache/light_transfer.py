"""LightTransfer: layers that look at the beginning and the end only keep nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paceline.abilities import Ability
from paceline.core import Exactness, Tokens
from paceline.kvcache.base import LayerCache, Policy, held_rows
from paceline.kvcache.query_attention import query_attention
from paceline.registry import Source, check_range, kv_policies


@kv_policies.register("light_transfer", Exactness.LOSSY)
@dataclass(frozen=True)
class LightTransfer(Policy):
    """Let lazy layers keep the first and the last positions, and the others all.

    A layer is the lazier, the more attention the last queries give to its first and last positions.
    The laziest are found when a text outgrows the budget; from then on they keep `budget` rows.
    The others grow with the text. Lazy layers attend to fewer rows and so are faster; a page of the
    cache holds rows of all layers, so that memory follows the others and does not fall.

    Attributes:
        budget: rows that each head of a lazy layer keeps. Default 1024.
        sinks: first positions that are kept. Default 4.
        every: committed positions between evictions. Default 64.
        lazy: share of the layers that is lazy, 0 to 1. Default 0.5, as in the paper.
        window: last positions whose queries tell, 1 to 4096. Default 64.
    """

    source = Source(
        authors="Zhang et al.",
        title="LightTransfer: Your Long-Context LLM is Secretly a Hybrid Model with Effortless "
        "Adaptation",
        arxiv="2410.13846",
        section="section 3",
        note="lazy layers are found where the text outgrows the budget, not at a prompt's end",
    )
    catalogue = (140,)
    needs = frozenset({Ability.EVICT, Ability.KEYS, Ability.QUERIES})
    examples = ("light_transfer", "light_transfer:budget=24,sinks=2,every=8,window=8")

    lazy: float = 0.5
    window: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(0.0, 1.0, self.name, lazy=self.lazy)
        check_range(1, 4096, self.name, window=self.window)

    @property
    def query_window(self) -> int:
        """Last positions whose queries are read."""
        return self.window

    def max_rows(self, length: int) -> int:
        """Return `length`: layers that are not lazy keep all."""
        return length if self.lazy < 1 else super().max_rows(length)

    def keep(self, layer: LayerCache) -> Tokens:
        """Return the rows of a lazy layer."""
        near = (layer.positions < self.sinks) | (
            layer.positions >= layer.length - (self.budget - self.sinks)
        )
        rows = held_rows(layer.positions)
        return rows[near].reshape(len(rows), -1)

    def choose(self, layers: Sequence[LayerCache]) -> list[Tokens]:
        """Return the rows of lazy layers, and all rows of the others.

        A layer that was lazy before holds little besides, and is found again.
        """
        laziness = np.array([self._laziness(layer) for layer in layers])
        count = round(self.lazy * len(laziness))
        lazy = set(np.argsort(-laziness, kind="stable")[:count].tolist())
        return [
            self.keep(layer)
            if place in lazy and layer.positions.shape[1] > self.budget
            else held_rows(layer.positions)
            for place, layer in enumerate(layers)
        ]

    def _laziness(self, layer: LayerCache) -> float:
        """Return the share of attention on first and last positions; above 1 if it was lazy."""
        if layer.positions.shape[1] < layer.length:
            return 2.0
        shares = query_attention(layer, self.window).mean((0, 1))  # [S]
        first = min(self.sinks, len(shares))
        last = max(first, len(shares) - (self.budget - self.sinks))
        return float(shares[:first].sum() + shares[last:].sum())
