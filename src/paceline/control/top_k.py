"""Top-k sampling."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.control.base import Stateless, require
from paceline.control.logits import keep_only
from paceline.core import Exactness, Floats
from paceline.registry import Source, controls


@controls.register("top_k", Exactness.EXACT)
@dataclass(frozen=True)
class TopK(Stateless):
    """Keep the k most likely tokens, and ties with the last of them.

    Attributes:
        k: number of tokens, at least 1. Default 50.
    """

    k: int = 50

    order = 60
    examples = ("top_k", "top_k:k=5")
    source = Source(
        authors="Fan et al.",
        title="Hierarchical Neural Story Generation",
        arxiv="1805.04833",
        section="section 5.2",
    )

    def __post_init__(self) -> None:
        require(self.k >= 1, "top_k", self.k, "at least 1")

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """Forbid every token below the k-th logit."""
        if self.k >= len(logits):
            return logits
        return keep_only(logits, logits >= np.partition(logits, -self.k)[-self.k])

    def keeps(self, logit: np.float32, above: Floats) -> bool:
        """Whether fewer than k logits are larger; see `Truncates`."""
        return int((above > logit).sum()) < self.k
