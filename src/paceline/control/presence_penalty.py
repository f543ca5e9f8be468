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
    """Make every token of the output less likely, however often it occurred there.

    Attributes:
        penalty: -2 to 2, taken from the logit; 0 does nothing. Default 0.5, as of
            `frequency_penalty`.
    """

    penalty: float = 0.5

    order = 22
    source = Source(title="OpenAI API reference, frequency and presence penalties")

    def __post_init__(self) -> None:
        require(-2 <= self.penalty <= 2, "presence_penalty", self.penalty, "-2 to 2")

    def bind(self, request: Request, vocabulary: Vocabulary) -> Control:
        """Looks from the end of the prompt."""
        return _Presence(self.penalty, len(request.prompt))


@dataclass(frozen=True)
class _Presence:
    penalty: float
    start: int

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        edited = logits.copy()
        edited[np.unique(np.asarray(history[self.start :], np.int64))] -= np.float32(self.penalty)
        return edited
