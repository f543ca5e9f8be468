"""Top-n-sigma sampling."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.control.base import Stateless, require
from paceline.control.logits import keep_only
from paceline.core import Exactness, Floats
from paceline.registry import Source, controls


@controls.register("top_n_sigma", Exactness.EXACT)
@dataclass(frozen=True)
class TopNSigma(Stateless):
    """Keep the logits within `n` standard deviations of the best: the same set at any temperature.

    Attributes:
        n: standard deviations of the allowed logits, 0 to 100; 0 keeps the best only. Default 1,
            the paper's.
    """

    n: float = 1.0

    order = 67
    source = Source(
        authors="Tang et al.",
        title="Top-nsigma: Not All Logits Are You Need",
        arxiv="2411.07641",
        section="algorithm 1",
    )

    def __post_init__(self) -> None:
        require(0 <= self.n <= 100, "top_n_sigma", self.n, "0 to 100")

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """Compare with max - n * sigma; forbidden tokens have no part in sigma."""
        allowed = logits[np.isfinite(logits)].astype(np.float64)
        if len(allowed) < 2:
            return logits
        return keep_only(logits, logits >= allowed.max() - self.n * allowed.std())
