"""Exponential length decay."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.control.base import ControlMethod, require
from paceline.core import Control, Exactness, Floats, Request
from paceline.models.vocabulary import Vocabulary
from paceline.registry import Source, controls

_MAX_GAIN = np.float32(1e30)


@controls.register("length_decay", Exactness.EXACT)
@dataclass(frozen=True)
class LengthDecay(ControlMethod):
    """Raise the logits of stop tokens exponentially after a given length.

    Attributes:
        start: number of new tokens after which it begins, at least 0.
        factor: 1 to 10; n tokens past `start`, the logit z of a stop token grows by
            |z| * (factor^n - 1). Default 1.05, which adds |z| after 14 tokens.
    """

    start: int
    factor: float = 1.05

    order = 24
    examples = ("length_decay:start=2,factor=1.3",)
    source = Source(title="Hugging Face transformers, exponential_decay_length_penalty")

    def __post_init__(self) -> None:
        require(self.start >= 0, "length_decay", self.start, "at least 0")
        require(1 <= self.factor <= 10, "length_decay:factor", self.factor, "1 to 10")

    def bind(self, request: Request, vocabulary: Vocabulary) -> Control:
        """Return the control for the request's stop tokens."""
        return _LengthDecay(
            len(request.prompt) + self.start, self.factor, sorted(request.stop_tokens)
        )


@dataclass(frozen=True)
class _LengthDecay:
    start: int
    factor: float
    stops: list[int]

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        past = len(history) - self.start
        if past <= 0 or not self.stops:
            return logits
        edited = logits.copy()
        stops = [stop for stop in self.stops if np.isfinite(logits[stop])]
        log_growth = min(past * np.log(self.factor), 60.0)
        edited[stops] += np.minimum(
            np.abs(logits[stops]) * np.float32(np.expm1(log_growth)), _MAX_GAIN
        )
        return edited
