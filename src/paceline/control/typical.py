"""Locally typical sampling."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.control.base import Stateless, require
from paceline.control.logits import entropy, keep_only, softmax, surprise
from paceline.core import Exactness, Floats
from paceline.registry import Source, controls


@controls.register("typical", Exactness.EXACT)
@dataclass(frozen=True)
class Typical(Stateless):
    """Keep the tokens whose surprise is nearest to the entropy, up to a probability mass.

    The most likely token may be dropped, also in greedy decoding.

    Attributes:
        mass: probability to keep, in (0, 1]; 1 keeps all. Default 0.95, the best on stories in
            the paper, table 3.
    """

    mass: float = 0.95

    order = 63
    examples = ("typical",)
    source = Source(
        authors="Meister et al.",
        title="Locally Typical Sampling",
        arxiv="2202.00666",
        section="section 4",
    )

    def __post_init__(self) -> None:
        require(0 < self.mass <= 1, "typical", self.mass, "above 0 and at most 1")

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """Sort by |surprise - entropy|; ties with the last kept token are kept."""
        if self.mass == 1:
            return logits
        p = softmax(logits)
        distance = np.abs(surprise(p) - entropy(p))
        order = np.argsort(distance, kind="stable")
        kept = min(int((np.cumsum(p[order]) < self.mass).sum()), len(order) - 1)
        return keep_only(logits, distance <= distance[order[kept]])
