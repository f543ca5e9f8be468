"""The green-list watermark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from paceline.control.base import require
from paceline.core import Exactness, Floats, Request
from paceline.noise import uniform
from paceline.registry import Source, watermarks
from paceline.watermarks.base import Detection, Watermark, enough
from paceline.watermarks.keys.context import context_stream, context_streams, windows

_KEPT = 1 << 20  # bytes of green lists that are cached for a request


@watermarks.register("green", Exactness.LOSSY)
@dataclass(frozen=True)
class Green(Watermark):
    """Raise the logits of a random part of the tokens, the green list, at each position.

    A hash of the key, the preceding tokens and the token itself decides which are green. It acts
    after all controls, temperature and truncation included, so `delta` is in log odds of the final
    distribution. The distribution of the text changes, and greedy decoding is marked, too. The
    standard baseline.

    Detection counts green tokens over distinct n-grams of context and token; p is the binomial
    tail. An edit affects the n-grams that contain it.

    Attributes:
        key: secret text; see `Watermark`.
        gamma: fraction of green tokens, in (0, 1). Default 0.25, as in the paper's examples.
        delta: added to the logits of green tokens, 0 to 100. Default 2, as there.
        context: number of preceding tokens in the hash, 1 to 16. Default 1, the paper's, which is
            the most robust to edits and the easiest to learn from texts.
    """

    examples = ("green:key=secret",)
    source = Source(
        authors="Kirchenbauer et al.",
        title="A Watermark for Large Language Models",
        arxiv="2301.10226",
        section="algorithm 2",
    )

    gamma: float = 0.25
    delta: float = 2.0
    context: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.gamma < 1, "the watermark's gamma", self.gamma, "above 0 and below 1")
        require(0 <= self.delta <= 100, "the watermark's delta", self.delta, "0 to 100")
        require(1 <= self.context <= 16, "the watermark's context", self.context, "1 to 16")

    def mark(self, request: Request) -> Request:
        """See `Watermark`."""
        return replace(request, controls=(*request.controls, _Greener(self)))

    def detect(self, tokens: Sequence[int], resamples: int = 999) -> Detection:
        """See `Watermark`."""
        runs = np.unique(windows(tokens, self.context + 1), axis=0)
        enough(len(runs), 1)
        starts = context_streams(self.seed, runs[:, :-1])
        green = int((uniform(starts, runs[:, -1]) < self.gamma).sum())
        spread = sqrt(len(runs) * self.gamma * (1 - self.gamma))
        z = (green - len(runs) * self.gamma) / spread
        return Detection(tail(green, len(runs), self.gamma), z, "z", len(runs))


def tail(count: int, of: int, prob: float) -> float:
    """Return P(at least `count` of `of` independent events of probability `prob` occur)."""
    k = np.arange(1, of + 1)
    logs = np.cumsum(np.log((of - k + 1) / k * (prob / (1 - prob))))
    logs = np.concatenate([[0.0], logs]) + of * np.log1p(-prob)
    return float(min(np.exp(logs[count:]).sum(), 1.0))


class _Greener:
    """Adds delta to the logits of green tokens."""

    def __init__(self, method: Green) -> None:
        self._method, self._seed = method, method.seed
        self._lists: dict[int, NDArray[np.uint8]] = {}  # a bit for each token

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """See `core.Control`."""
        method = self._method
        if len(history) < method.context:
            return logits
        start = context_stream(self._seed, history[-method.context :])
        packed, size = self._lists.get(start), len(logits)
        if packed is None:
            packed = np.packbits(uniform(start, np.arange(size)) < method.gamma)
            if (len(self._lists) + 1) * len(packed) > _KEPT:
                self._lists.clear()
            self._lists[start] = packed
        green = np.unpackbits(packed, count=size).view(np.bool_)
        edited = logits.copy()
        edited[green] += np.float32(method.delta)
        return edited
