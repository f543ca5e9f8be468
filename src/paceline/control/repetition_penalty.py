"""Repetition penalty."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.control.base import Stateless, require
from paceline.core import Exactness, Floats
from paceline.registry import Source, controls


@controls.register("repetition_penalty", Exactness.EXACT)
@dataclass(frozen=True)
class RepetitionPenalty(Stateless):
    """Penalise every token of prompt and output, once, however often it occurred.

    Attributes:
        penalty: 0.01 to 100; 1 does nothing, above 1 penalises. Positive logits are divided by it,
            negative ones multiplied. Default 1.1.
    """

    penalty: float = 1.1

    order = 20
    examples = ("repetition_penalty", "repetition_penalty:penalty=1.2")
    source = Source(
        authors="Keskar et al.", title="CTRL", arxiv="1909.05858", section="section 4.1"
    )

    def __post_init__(self) -> None:
        require(1e-2 <= self.penalty <= 1e2, "repetition_penalty", self.penalty, "0.01 to 100")

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """Penalise the tokens of `history`."""
        if self.penalty == 1:
            return logits
        seen = np.unique(np.asarray(history, np.int64))
        edited = logits.copy()
        old = logits[seen]
        edited[seen] = np.where(old > 0, old / self.penalty, old * self.penalty)
        return edited
