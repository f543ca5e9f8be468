"""Min-p sampling."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.control.base import Stateless, require
from paceline.control.logits import keep_only
from paceline.core import Exactness, Floats
from paceline.registry import Source, controls


@controls.register("min_p", Exactness.EXACT)
@dataclass(frozen=True)
class MinP(Stateless):
    """Keep the tokens at least `p` times as likely as the most likely one.

    Attributes:
        p: fraction of the largest probability, in [0, 1]; 0 keeps all. Default 0.05.
    """

    p: float = 0.05

    order = 62
    examples = ("min_p", "min_p:p=0.02")
    source = Source(
        authors="Minh et al.", title="Turning Up the Heat: Min-p Sampling", arxiv="2407.01082"
    )
    catalogue = (207,)

    def __post_init__(self) -> None:
        require(0 <= self.p <= 1, "min_p", self.p, "0 to 1")

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """Keep logits of at least max + log(p)."""
        if self.p == 0:
            return logits
        return keep_only(logits, logits >= logits.max() + np.float32(np.log(self.p)))

    def keeps(self, logit: np.float32, above: Floats) -> bool:
        """Whether the largest logit leaves it; see `Truncates`."""
        return self.p == 0 or bool(logit >= above.max() + np.float32(np.log(self.p)))
