"""XTC: exclude top choices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.control.base import ControlMethod, require
from paceline.control.logits import keep_only, softmax
from paceline.core import Control, Exactness, Floats, Request
from paceline.models.vocabulary import Vocabulary
from paceline.noise import gumbel
from paceline.registry import Source, controls

_OTHER = 0x585443  # separates its noise from that of the draws


@controls.register("xtc", Exactness.EXACT)
@dataclass(frozen=True)
class Xtc(ControlMethod):
    """At random positions drop all tokens above a probability but the least likely of them.

    Whether it acts at a position depends only on the request's seed and the position.

    Attributes:
        threshold: in [0, 1]; tokens at least this likely are top choices. Above 0.5 there is never
            more than one, and nothing is dropped. Default 0.1, the author's.
        probability: probability of acting at a position. Default 0.5, the author's.
    """

    threshold: float = 0.1
    probability: float = 0.5

    order = 68
    examples = ("xtc", "xtc:threshold=0.05")
    source = Source(
        authors="P. E. Weidmann",
        title="Exclude Top Choices, text-generation-webui pull request 6335, 2024",
    )

    def __post_init__(self) -> None:
        require(0 <= self.threshold <= 1, "xtc:threshold", self.threshold, "0 to 1")
        require(0 <= self.probability <= 1, "xtc:probability", self.probability, "0 to 1")

    def bind(self, request: Request, vocabulary: Vocabulary) -> Control:
        """Return the control, keyed by the request's seed."""
        return _Xtc(self, request.seed)


@dataclass(frozen=True)
class _Xtc:
    method: Xtc
    seed: int

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        noise = gumbel(self.seed ^ _OTHER, len(history), np.zeros(1, np.int64))[0]
        if np.exp(-np.exp(-noise)) >= self.method.probability:  # uniform in (0, 1)
            return logits
        p = softmax(logits)
        top = np.flatnonzero(p >= self.method.threshold)
        if len(top) < 2:
            return logits
        kept = p < self.method.threshold
        kept[top[p[top].argmin()]] = True
        return keep_only(logits, kept)
