"""Nucleus sampling."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.control.base import Stateless, require
from paceline.control.logits import keep_only
from paceline.core import Exactness, Floats
from paceline.registry import Source, controls

_MARGIN = 1e-9  # of sums in another order


@controls.register("top_p", Exactness.EXACT)
@dataclass(frozen=True)
class TopP(Stateless):
    """Keep the smallest set of most likely tokens whose probabilities sum to `p` or more.

    Attributes:
        p: probability mass in [0, 1]; 1 keeps all, 0 the most likely token. Default 0.95.
    """

    p: float = 0.95

    order = 61
    examples = ("top_p", "top_p:p=0.9")
    source = Source(
        authors="Holtzman et al.",
        title="The Curious Case of Neural Text Degeneration",
        arxiv="1904.09751",
    )

    def __post_init__(self) -> None:
        require(0 <= self.p <= 1, "top_p", self.p, "0 to 1")

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """Forbid the tokens outside the nucleus; among ties, lower ids are kept first."""
        if self.p == 1:
            return logits
        order = np.argsort(-logits, kind="stable")
        weights = np.exp(logits[order].astype(np.float64) - float(logits[order[0]]))
        before = (np.cumsum(weights) - weights) / weights.sum()
        kept = before < self.p
        kept[0] = True
        return keep_only(logits, order[kept])

    def keeps(self, logit: np.float32, above: Floats) -> bool:
        """Whether those above it are less than `p` even of themselves; see `Truncates`."""
        if self.p == 1 or len(above) == 1:
            return True
        weights = np.exp(above.astype(np.float64) - float(above.max()))
        own = float(np.exp(float(logit) - float(above.max())))
        total = float(weights.sum())
        return (total - own) / total < self.p - _MARGIN
