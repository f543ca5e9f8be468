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

_BITS = 12  # of u: as many as a detector needs


@watermarks.register("exponential", Exactness.DISTRIBUTION)
@dataclass(frozen=True)
class Exponential(KeySequence):
    """Draw the token that minimises -log(u) / p, where u are uniform numbers that the key gives.

    That is the walk's own draw, whose Gumbel noise is -log(-log(u)): only its key changes, from
    the request's seed to the secret. So draft models go on sharing the noise, and it costs nothing.

    Detection aligns the text with the sequence and compares with random keys. A token earns the
    log of how much likelier its u is beside this element than by chance: u^(1/p - 1) / p, averaged
    over all p since the detector does not know the model. On low-entropy text that finds more than
    the paper's -log(1 - u), whose rare large values come by chance, too.

    Attributes:
        key: secret; see `Watermark`.
        length: of the key sequence, in tokens: the longest output and the number of different
            outputs of a prompt. Detection's time and false alignments grow with it. Default 256,
            the paper's.
    """

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
    """Log of u^(1/p - 1) / p averaged over p, for each u of `_BITS` bits; mean -0.25."""
    u = (np.arange(1 << _BITS) + 0.5) / (1 << _BITS)
    p = (np.arange(256) + 0.5) / 256
    found: Floats = np.log((u[:, None] ** (1 / p - 1) / p).mean(1)).astype(np.float32)
    return found
