"""Presence penalty."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.control.base import ControlMethod, require
from paceline.core import Control, Exactness, Floats, Request
from paceline.models.vocabulary import Vocabulary
from paceline.registry import Source, controls


@controls.register("presence_penalty", Exactness.EXACT)
@dataclass(frozen=True)
class PresencePenalty(ControlMethod):
    """Subtract a constant from the logit of every token that the output already has.

    Attributes:
        penalty: -2 to 2, subtracted from the logit; 0 does nothing. Default 0.5, as in
            `frequency_penalty`.
    """

    penalty: float = 0.5

    order = 22
    examples = ("presence_penalty",)
    source = Source(title="OpenAI API reference, frequency and presence penalties")

    def __post_init__(self) -> None:
        require(-2 <= self.penalty <= 2, "presence_penalty", self.penalty, "-2 to 2")

    def bind(self, request: Request, vocabulary: Vocabulary) -> Control:
        """Return the control; it sees the tokens after the prompt."""
        return _Presence(self.penalty, len(request.prompt))


@dataclass(frozen=True)
class _Presence:
    penalty: float
    start: int

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        edited = logits.copy()
        edited[np.unique(np.asarray(history[self.start :], np.int64))] -= np.float32(self.penalty)
        return edited
