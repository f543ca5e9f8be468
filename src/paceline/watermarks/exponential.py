"""The exponential-minimum watermark."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from paceline.core import Exactness, Floats, Request
from paceline.noise import bits, stream, streams
from paceline.registry import Source, watermarks
from paceline.watermarks.keys.alignment import Seeds
from paceline.watermarks.keys.sequence import KeySequence

_BITS = 12  # precision of u in detection


@watermarks.register("exponential", Exactness.DISTRIBUTION)
@dataclass(frozen=True)
class Exponential(KeySequence):
    """Draw the token that minimises -log(u) / p, with uniform numbers u derived from the key.

    That is the walk's own draw, whose Gumbel noise is -log(-log(u)), keyed by the secret instead of
    the request's seed. So draft models still share the noise, and it costs nothing.

    Detection aligns the text with the key sequence and compares with random keys. The score of a
    token is the log of the likelihood ratio of its u at this element, u^(1/p - 1) / p, averaged
    over p, as the detector does not know the model. On low-entropy text this detects more than the
    paper's -log(1 - u), whose rare large values also occur without a watermark.

    Attributes:
        key: secret text; see `Watermark`.
        length: length of the key sequence in tokens, which is also the longest output and the
            number of different outputs of a prompt. Detection time and false alignments grow with
            it. Default 256,
            the paper's.
    """

    examples = ("exponential:key=secret,length=64",)
    source = Source(
        authors="Kuditipudi et al.",
        title="Robust Distortion-free Watermarks for Language Models",
        arxiv="2307.15593",
        section="section 2.3",
    )
    catalogue = (418,)

    def mark(self, request: Request) -> Request:
        """See `Watermark`."""
        self.check(request)
        seed = self.seed
        return replace(request, noise=lambda p: stream(seed, self.element(request, p)))

    def rows(self, seeds: Seeds, tokens: NDArray[np.int64]) -> Floats:
        """See `KeySequence`."""
        starts = streams(seeds[:, None], np.arange(self.length))
        u = bits(starts, tokens[:, None, None]) >> np.uint64(64 - _BITS)
        earned: Floats = _earned()[u]
        return earned


@lru_cache(maxsize=1)
def _earned() -> Floats:
    """Return log of u^(1/p - 1) / p averaged over p, for each u of `_BITS` bits; mean -0.25."""
    u = (np.arange(1 << _BITS) + 0.5) / (1 << _BITS)
    p = (np.arange(256) + 0.5) / 256
    scores: Floats = np.log((u[:, None] ** (1 / p - 1) / p).mean(1)).astype(np.float32)
    return scores
