"""The inverse-transform watermark."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from paceline.control.logits import softmax
from paceline.core import Exactness, Floats, Request
from paceline.noise import stream, streams, uniform
from paceline.registry import Source, watermarks
from paceline.watermarks.keys.alignment import Seeds
from paceline.watermarks.keys.sequence import KeySequence

_ORDER = 0x6F72646572  # separates the permutation's random numbers from those of the sequence
_ONE = np.zeros(1, np.int64)


@watermarks.register("inverse", Exactness.DISTRIBUTION)
@dataclass(frozen=True)
class Inverse(KeySequence):
    """Permute the tokens secretly, and draw by inverting the cumulative distribution at u.

    The key gives the permutation, and one uniform number u for each position: the token is drawn
    whose interval of the cumulative distribution contains u. The walk then has no noise, and draft
    models draft without it.

    Detection aligns the text with the key sequence. At distance d between u and a token's position
    in the permutation, the score is log 2 (1 - d)^2, close to the likelihood ratio measured on
    small models. Much weaker than `exponential` at the same length, as no d is strong evidence.

    Attributes:
        key: secret text; see `Watermark`.
        length: length of the key sequence; see `exponential`.
    """

    examples = ("inverse:key=secret,length=64",)
    source = Source(
        authors="Kuditipudi et al.",
        title="Robust Distortion-free Watermarks for Language Models",
        arxiv="2307.15593",
        section="section 2.2",
    )
    catalogue = (418,)

    def mark(self, request: Request) -> Request:
        """See `Watermark`."""
        self.check(request)
        drawn = _Drawn(self, request)
        return replace(request, controls=(*request.controls, drawn), noise=lambda position: None)

    def rows(self, seeds: Seeds, tokens: NDArray[np.int64]) -> Floats:
        """See `KeySequence`."""
        starts = streams(seeds[:, None], np.arange(self.length))
        u = uniform(starts, _ONE).astype(np.float32)  # [B, L]
        order = uniform(_order(seeds), tokens[:, None]).astype(np.float32)  # [D, B]
        near = np.maximum(np.float32(1.0) - np.abs(u - order[:, :, None]), np.float32(1e-3))
        earned: Floats = np.log(near * near * np.float32(2.0))
        return earned


def _order(seeds: Seeds) -> Seeds:
    return streams(seeds ^ np.uint64(_ORDER), np.zeros(1, np.int64))


class _Drawn:
    """Gives scores whose maximum is the draw: -2 times the distance of u from a token's interval.

    A change of the logits by e moves an interval by at most e / 2, so the margin of the scores is
    in units of logits.
    """

    def __init__(self, method: Inverse, request: Request) -> None:
        self._method, self._request, self._seed = method, request, method.seed
        self._order: NDArray[np.int64] = _ONE

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """See `core.Control`."""
        if len(self._order) != len(logits):
            start = _order(np.array([self._seed], np.uint64))
            self._order = np.argsort(uniform(start, np.arange(len(logits))), kind="stable")
        p = softmax(logits)[self._order]
        high = np.cumsum(p)
        low = high - p
        element = self._method.element(self._request, len(history))
        u = float(uniform(stream(self._seed, element), _ONE)[0]) * high[-1]
        place = min(int(np.searchsorted(high, u, side="right")), len(p) - 1)
        scores = -2.0 * np.maximum(np.maximum(low - u, u - high), 0.0)
        scores[p == 0] = -np.inf
        scores[place] = 0.0
        edited = np.empty(len(logits), np.float32)
        edited[self._order] = scores
        return edited
