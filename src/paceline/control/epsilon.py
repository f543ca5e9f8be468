"""Epsilon sampling."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.control.base import Stateless, require
from paceline.control.logits import keep_only, softmax
from paceline.core import Exactness, Floats
from paceline.registry import Source, controls


@controls.register("epsilon", Exactness.EXACT)
@dataclass(frozen=True)
class Epsilon(Stateless):
    """Keep the tokens with a probability of at least `cutoff`, and the most likely one always.

    Attributes:
        cutoff: probability in [0, 1); 0 keeps all. Default 0.0006, within the 0.0003 to 0.0009
            that the paper's appendix selects for GPT-2 models.
    """

    cutoff: float = 6e-4

    order = 65
    examples = ("epsilon",)
    source = Source(
        authors="Hewitt et al.",
        title="Truncation Sampling as LM Desmoothing",
        arxiv="2210.15191",
        section="section 4.1",
    )

    def __post_init__(self) -> None:
        require(0 <= self.cutoff < 1, "epsilon", self.cutoff, "0 to below 1")

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """Keep the tokens at or above the cutoff."""
        if self.cutoff == 0:
            return logits
        return keep_only(logits, (softmax(logits) >= self.cutoff) | (logits == logits.max()))
