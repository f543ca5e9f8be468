"""Blocking of repeated n-grams."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from paceline.control.base import Stateless, require
from paceline.control.logits import forbid
from paceline.core import Exactness, Floats
from paceline.registry import Source, controls


@controls.register("no_repeat_ngram", Exactness.EXACT)
@dataclass(frozen=True)
class NoRepeatNgram(Stateless):
    """Forbid every token that would complete an n-gram that prompt or output already contains.

    Attributes:
        n: length in tokens, at least 1. Default 3, the paper's for summaries.
    """

    n: int = 3

    order = 30
    examples = ("no_repeat_ngram",)
    source = Source(
        authors="Paulus et al.",
        title="A Deep Reinforced Model for Summarization",
        arxiv="1705.04304",
        section="section 2.5",
    )

    def __post_init__(self) -> None:
        require(self.n >= 1, "no_repeat_ngram", self.n, "at least 1")

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """Find the earlier n-grams that begin with the last n - 1 tokens."""
        if len(history) < self.n:
            return logits
        text = np.asarray(history, np.int64)
        ngrams = sliding_window_view(text, self.n)
        same = (ngrams[:, :-1] == text[len(text) - self.n + 1 :]).all(1)
        return forbid(logits, ngrams[same, -1])
