"""DRY: don't repeat yourself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paceline.control.base import ControlMethod, require
from paceline.core import Control, Exactness, Floats, Request
from paceline.models.vocabulary import Vocabulary, words
from paceline.registry import Source, controls

_LONGEST = 50  # longest repetition that is measured, in tokens; its penalty is prohibitive already


@controls.register("dry", Exactness.EXACT)
@dataclass(frozen=True)
class Dry(ControlMethod):
    """Penalise the token that would continue a repetition, the more the longer it is.

    If the last L tokens occurred before, followed by t, the logit of t falls by
    multiplier * base^(L - allowed).

    Attributes:
        multiplier: 0 to 100; 0 does nothing. Default 0.8, the author's.
        base: 1 to 10. Default 1.75, the author's.
        allowed: length of the shortest repetition that is penalised, at least 1. Default 2, the
            author's.
        reach: number of last tokens of prompt and output that are searched; 0 is all. Default 0.
        breakers: token ids and quoted texts, separated by `;`. A repetition ends at a token that
            contains one. Default the author's: newline, colon, quote, asterisk.
    """

    multiplier: float = 0.8
    base: float = 1.75
    allowed: int = 2
    reach: int = 0
    breakers: str = r'"\n";":";"\"";"*"'

    order = 23
    examples = ("dry", "dry:multiplier=2,allowed=1")
    source = Source(
        authors="P. E. Weidmann", title="DRY, text-generation-webui pull request 5677, 2024"
    )

    def __post_init__(self) -> None:
        require(0 <= self.multiplier <= 100, "dry", self.multiplier, "0 to 100")
        require(1 <= self.base <= 10, "dry:base", self.base, "1 to 10")
        require(self.allowed >= 1, "dry:allowed", self.allowed, "at least 1")
        require(self.reach >= 0, "dry:reach", self.reach, "at least 0")
        words("dry:breakers", self.breakers)

    def bind(self, request: Request, vocabulary: Vocabulary) -> Control:
        """Look up the tokens that end repetitions."""
        breaks = np.zeros(vocabulary.size, bool)
        for item in words("dry:breakers", self.breakers):
            if isinstance(item, str):
                breaks[vocabulary.containing(item.encode())] = True
            else:
                breaks[vocabulary.known("dry:breakers", item)] = True
        return _Dry(self, breaks)


@dataclass(frozen=True)
class _Dry:
    method: Dry
    breaks: NDArray[np.bool_]

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        method = self.method
        text = np.asarray(history[-method.reach :] if method.reach else history, np.int64)
        last = len(text) - 1
        ends = np.arange(last)  # where an earlier occurrence of the last tokens may end
        lengths = np.zeros(last, np.int64)
        for length in range(min(last, _LONGEST)):
            token = text[last - length]
            if self.breaks[token]:
                break
            ends = ends[ends >= length]
            ends = ends[text[ends - length] == token]
            lengths[ends] = length + 1
            if not len(ends):
                break
        long = np.flatnonzero(lengths >= method.allowed)
        if not len(long):
            return logits
        longest = np.zeros(len(logits), np.int64)
        np.maximum.at(longest, text[long + 1], lengths[long])
        repeated = np.flatnonzero(longest)
        penalty = method.multiplier * method.base ** (longest[repeated] - method.allowed)
        edited = logits.copy()
        edited[repeated] -= penalty.astype(np.float32)
        return edited
