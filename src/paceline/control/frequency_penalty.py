"""Frequency penalty."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.control.base import ControlMethod, require
from paceline.core import Control, Exactness, Floats, Request
from paceline.models.vocabulary import Vocabulary
from paceline.registry import Source, controls


@controls.register("frequency_penalty", Exactness.EXACT)
@dataclass(frozen=True)
class FrequencyPenalty(ControlMethod):
    """Make every token of the output less likely, the more often it occurred there.

    Attributes:
        penalty: -2 to 2, taken from a logit for each occurrence; 0 does nothing. Default 0.5,
            within the 0.1 to 1 that the OpenAI API's reference suggests.
    """

    penalty: float = 0.5

    order = 21
    examples = ("frequency_penalty",)
    source = Source(title="OpenAI API reference, frequency and presence penalties")

    def __post_init__(self) -> None:
        require(-2 <= self.penalty <= 2, "frequency_penalty", self.penalty, "-2 to 2")

    def bind(self, request: Request, vocabulary: Vocabulary) -> Control:
        """Return the control; it counts tokens after the prompt."""
        return _Frequency(self.penalty, len(request.prompt))


@dataclass(frozen=True)
class _Frequency:
    penalty: float
    start: int

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        counts = np.bincount(history[self.start :], minlength=len(logits))
        edited: Floats = logits - np.float32(self.penalty) * counts.astype(np.float32)
        return edited
