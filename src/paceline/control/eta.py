"""Eta sampling."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.control.base import Stateless, require
from paceline.control.logits import entropy, keep_only, softmax
from paceline.core import Exactness, Floats
from paceline.registry import Source, controls


@controls.register("eta", Exactness.EXACT)
@dataclass(frozen=True)
class Eta(Stateless):
    """Epsilon sampling with a cutoff that is lower where entropy is high.

    Attributes:
        epsilon: in [0, 1); the cutoff is min(epsilon, sqrt(epsilon) * exp(-entropy)); 0 keeps
            all. Default 0.0006, within the 0.0003 to 0.002 of the paper.
    """

    epsilon: float = 6e-4

    order = 66
    examples = ("eta",)
    source = Source(
        authors="Hewitt et al.",
        title="Truncation Sampling as LM Desmoothing",
        arxiv="2210.15191",
        section="section 4.2",
    )

    def __post_init__(self) -> None:
        require(0 <= self.epsilon < 1, "eta", self.epsilon, "0 to below 1")

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """Keep the tokens at or above the cutoff, and the most likely one."""
        if self.epsilon == 0:
            return logits
        p = softmax(logits)
        cutoff = min(self.epsilon, self.epsilon**0.5 * np.exp(-entropy(p)))
        return keep_only(logits, (p >= cutoff) | (logits == logits.max()))
