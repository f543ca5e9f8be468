"""Tournament sampling, as in SynthID-Text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import erfc, sqrt
from typing import ClassVar

import numpy as np

from paceline import _native
from paceline.control.base import require
from paceline.core import Exactness, Floats, Request
from paceline.errors import RequestError
from paceline.noise import bits
from paceline.registry import Source, watermarks
from paceline.watermarks.base import Detection, Watermark, enough
from paceline.watermarks.keys.context import context_stream, context_streams, windows

_LANES = 32  # partial sums
_NEVER = np.float32(1e-30)  # a probability that is never drawn; denormal numbers would be slow


@watermarks.register("synthid", Exactness.DISTRIBUTION)
@dataclass(frozen=True)
class Synthid(Watermark):
    """Let candidates play a tournament of several layers, each decided by a secret bit.

    The bits g of a token are a keyed hash of it and the preceding tokens. In each layer, the
    candidate with bit 1 wins against one with bit 0; for whole distributions that is
    p(x) <- p(x) (1 + g(x) - sum of p g), after all controls. The walk draws from the result.
    Averaged over keys, texts have the distribution of plain sampling: a position whose context
    occurred before in the output is left unmarked.

    The test statistic is the mean bit over the tokens, with larger weights for early layers; p is
    the normal tail. An edit also affects the `context` tokens after it.

    Attributes:
        key: secret text; see `Watermark`.
        layers: number of layers, which is bits per token, 1 to 64. Default 30, the paper's.
        context: number of preceding tokens in the hash, 1 to 16. Default 4, the paper's.
    """

    examples = ("synthid:key=secret,layers=8,context=2",)
    source = Source(
        authors="Dathathri et al.",
        title="Scalable watermarking for identifying large language model outputs",
        section="Nature 634, 2024, non-distortionary form",
    )

    layers: int = 30
    context: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.layers <= 64, "the watermark's layers", self.layers, "1 to 64")
        require(1 <= self.context <= 16, "the watermark's context", self.context, "1 to 16")

    def mark(self, request: Request) -> Request:
        """See `Watermark`."""
        if request.temperature == 0:
            raise RequestError(
                "the watermark synthid chooses among what sampling might draw, and temperature 0 "
                "leaves no choice; take a temperature above 0, or kind=green"
            )
        control = _Tournament(self, self.seed, len(request.prompt))
        return replace(request, controls=(*request.controls, control))

    def detect(self, tokens: Sequence[int], resamples: int = 999) -> Detection:
        """See `Watermark`."""
        runs = windows(tokens, self.context + 1)
        _, first = np.unique(runs[:, :-1], axis=0, return_index=True)
        runs = runs[np.sort(first)]
        enough(len(runs), 1)
        after = bits(context_streams(self.seed, runs[:, :-1]), runs[:, -1])
        layers = np.arange(self.layers, dtype=np.uint64)
        shares = ((after[:, None] >> layers) & np.uint64(1)).mean(0)
        weights = np.linspace(10.0, 1.0, self.layers)
        weights /= weights.sum()
        mean = float(weights @ shares)
        spread = sqrt(float(weights @ weights) / 4 / len(runs))
        p = 0.5 * erfc((mean - 0.5) / spread / sqrt(2))
        return Detection(p, mean, "weighted mean", len(runs))


@dataclass(frozen=True)
class _Tournament:
    """Edits the distribution by one tournament; `start` is the output's first position."""

    low_entropy: ClassVar[bool] = True  # see `control.capabilities.LowEntropy`

    method: Synthid
    seed: int
    start: int

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """See `core.Control`."""
        context = history[-self.method.context :]
        if len(context) < self.method.context or self._seen(history, context):
            return logits
        top = logits.max()
        if not np.isfinite(top):
            return logits  # the walk reports the error
        p = np.exp(logits - top)
        p /= np.float32(p.sum(dtype=np.float64))
        p = _native.tournament(p, context_stream(self.seed, context), self.method.layers)
        with np.errstate(divide="ignore"):
            logs: Floats = np.log(p)
        return logs

    def _seen(self, history: list[int], context: list[int]) -> bool:
        """Return whether a token of the output was drawn after the same context."""
        size = len(context)
        for end in range(max(self.start, size), len(history)):
            if history[end - 1] == context[-1] and history[end - size : end] == context:
                return True
        return False


def tournament(probs: Floats, start: int, layers: int) -> Floats:
    """Return `probs` [V] after all layers: the slow reference of `_native.tournament`, bit for bit.

    The probability of bit 1 is summed in fixed lanes, so that its order is the same everywhere.
    """
    tokens = np.flatnonzero(probs)
    p = np.pad(probs[tokens], (0, -len(tokens) % _LANES))
    random = np.pad(bits(start, tokens), (0, -len(tokens) % _LANES))
    for layer in range(layers):
        g = (random >> np.uint64(layer) & np.uint64(1)).astype(bool)
        sums = np.where(g, p, np.float32(0)).reshape(-1, _LANES).sum(0)
        rest = 1.0 - min(sum(sums.tolist()), 1.0)
        p = p * np.where(g, np.float32(1.0 + rest), np.float32(rest))
        p[p < _NEVER] = 0.0
    after = np.zeros_like(probs)
    after[tokens] = p[: len(tokens)]
    return after
