"""Watermarks keyed by position: the key gives a sequence of random numbers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from paceline.compatibility import Side, check
from paceline.core import Floats, Request
from paceline.errors import RequestError
from paceline.noise import stream
from paceline.watermarks.base import Detection, Watermark, enough
from paceline.watermarks.keys.alignment import Seeds, best_alignment, resampled

_OFFSET = 0x6F6666736574  # separates offsets from the noise of the same seed


@dataclass(frozen=True)
class KeySequence(Watermark):
    """A watermark whose draw at a position depends on the logits and one element of a sequence.

    The sequence is circular, and a request's seed decides where it starts; so seeds still give
    different texts, as many as the sequence has elements. Averaged over keys, a text has the
    distribution of plain sampling, as it uses no element twice.
    """

    min_tokens: ClassVar[int] = 2
    gap: ClassVar[float] = 2.0  # cost of a skipped token or element, in units of token scores

    length: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.length <= 1 << 16:
            raise RequestError(f"the watermark's length is {self.length}, expected 2 to 65536")

    @property
    def longest(self) -> int | None:
        """Maximum number of output tokens: no element is used twice."""
        return self.length

    def check(self, request: Request) -> None:
        """Refuse a request without noise to replace.

        Raises:
            PacelineError: greedy decoding, another walk, or more tokens than elements.
        """
        sides = {Side.NOISE_WATERMARK: f"the watermark {self.name}"}
        if request.temperature == 0:
            sides[Side.GREEDY] = "temperature 0"
        if request.walk != "gumbel":
            sides[Side.REJECTION] = f"the {request.walk} walk"
        check(sides)
        if request.max_new_tokens > self.length:
            raise RequestError(
                f"the output may have {request.max_new_tokens} tokens and the watermark's "
                f"sequence has {self.length}; ask for fewer, or make and detect it with a "
                "larger length=..."
            )

    def element(self, request: Request, position: int) -> int:
        """Return the index of the element that the draw at `position` uses."""
        return (stream(request.seed, _OFFSET) + position) % self.length

    def detect(self, tokens: Sequence[int], resamples: int = 999) -> Detection:
        """See `Watermark`; edits of the text lower the score but keep the alignment."""
        enough(len(tokens), self.min_tokens)
        if resamples < 1:
            raise RequestError(f"resamples is {resamples}, expected at least 1")
        known, order = np.unique(np.asarray(tokens, np.int64), return_inverse=True)

        def score(seeds: Seeds) -> Floats:
            return best_alignment(self.rows(seeds, known), order, self.gap)

        statistic, p = resampled(score, self.seed, self.length, resamples)
        return Detection(p, statistic, "alignment", len(tokens))

    @abstractmethod
    def rows(self, seeds: Seeds, tokens: NDArray[np.int64]) -> Floats:
        """Return the score of `tokens` [D] at each element of the keys `seeds` [B], [D, B, L].

        Scores are negative on average if text and key are unrelated.
        """
