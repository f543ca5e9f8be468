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
    """Keep logits within `n` standard deviations of the largest: one set at every temperature.

    Attributes:
        n: number of standard deviations, 0 to 100; 0 keeps the largest only. Default 1,
            the paper's.
    """

    n: float = 1.0

    order = 67
    examples = ("top_n_sigma",)
    source = Source(
        authors="Tang et al.",
        title="Top-nsigma: Not All Logits Are You Need",
        arxiv="2411.07641",
        section="algorithm 1",
    )

    def __post_init__(self) -> None:
        require(0 <= self.n <= 100, "top_n_sigma", self.n, "0 to 100")

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """Keep logits of at least max - n * sigma; forbidden tokens do not count for sigma."""
        allowed = logits[np.isfinite(logits)].astype(np.float64)
        if len(allowed) < 2:
            return logits
        return keep_only(logits, logits >= allowed.max() - self.n * allowed.std())
