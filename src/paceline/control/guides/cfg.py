"""Classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from paceline.control.base import require
from paceline.control.guides.base import Guide, GuideMethod
from paceline.control.guides.guide_models import GuideModels
from paceline.control.guides.guide_stream import GuideStream
from paceline.control.logits import softmax
from paceline.core import Control, Exactness, Floats, Request, Tokens
from paceline.errors import RequestError
from paceline.registry import Source, guides


@guides.register("cfg", Exactness.EXACT)
@dataclass(frozen=True, kw_only=True)
class Cfg(GuideMethod):
    """Steer away from another prompt: other + scale * (logits - other), both by the model itself.

    `other` are its logits when the output so far follows `negative` instead of the prompt. If that
    is the question without its document, and scale = 1 + a, this is context-aware decoding (Shi et
    al., arXiv 2305.14739).

    Adaptive Guidance ends where guidance has no effect any more. For text: once the two
    distributions differ by at most `stop` in total variation at a drawn token, the rest of the
    output is the model's own and costs no more passes. The paper compares image noise by cosine.

    Attributes:
        negative: the other prompt. Default: the prompt's last token only,
            after a BOS token if texts begin with one.
        scale: 0 to 100. Default 1.5, the paper's; 1 changes nothing.
        stop: 0 to 1. Default 0: guide to the end.
    """

    negative: str = ""
    scale: float = 1.5
    stop: float = 0.0

    order = 1
    examples = ("cfg", "cfg:negative=Once,scale=2", "cfg:negative=Once,stop=0.3")
    passes = "one of the model itself, until `stop`"
    source = Source(
        authors="Sanchez et al.",
        title="Stay on Topic with Classifier-Free Guidance",
        arxiv="2306.17806",
        section="section 2.2",
        note="Castillo et al., Adaptive Guidance, arXiv 2312.12487",
    )
    catalogue = (10,)
    missing = {10: "diffusion models; total variation stands for the cosine of images"}

    def __post_init__(self) -> None:
        require(0 <= self.scale <= 100, "cfg:scale", self.scale, "0 to 100")
        require(0 <= self.stop <= 1, "cfg:stop", self.stop, "0 to 1")

    def bind(self, request: Request, models: GuideModels) -> Control:
        """Open a second sequence of the model."""
        own = models.tokenizer.encode(self.negative)
        if own == models.tokenizer.encode(""):
            own = [*own, *request.prompt[-1:]]
        stream = models.open_stream(models.engine, request, own, len(request.prompt))
        if self.stop:
            return _Adaptive(self, stream, request)
        return Guide(self.edit, [stream], request)

    def edit(self, logits: Floats, other: Floats) -> Floats:
        """Return the guided logits [V]; exactly `logits` at scale 1."""
        guided: Floats = logits + (self.scale - 1) * (logits - other)
        return guided


class _Adaptive(Guide):
    """Guidance that ends. Where depends on earlier draws, so positions must come in order."""

    append_only = True

    def __init__(self, method: Cfg, stream: GuideStream, request: Request) -> None:
        super().__init__(method.edit, [stream], request)
        self._stop = method.stop
        self._reached = len(request.prompt) - 1  # longest text seen
        self._end: int | None = None  # length of the text at which the two agreed

    def prepare(self, context: Tokens) -> bool:
        """See `Guide`; nothing runs after guidance has ended."""
        return not self._ended(len(context)) and super().prepare(context)

    def lag(self, context: Tokens) -> int:
        """See `RunsModel`; nothing is unread after guidance has ended."""
        return 0 if self._ended(len(context)) else super().lag(context)

    def follow(self, context: Tokens, max_tokens: int | None = None) -> int:
        """See `RunsModel`; nothing is read after guidance has ended."""
        return 0 if self._ended(len(context)) else super().follow(context, max_tokens)

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """Guide the logits [V] until guidance ends."""
        size = len(history)
        if size == len(self._prompt):  # from the beginning, perhaps once more
            self._reached, self._end = size - 1, None
        if self._ended(size):
            return logits
        if size > self._reached + 1:
            raise RequestError("cfg:stop was called out of order; use one request at a time")
        self._reached = size
        return super().apply(logits, history)

    ranking_logits = apply

    def guided(
        self, logits: Floats, rows: list[Floats], history: list[int], edit: Callable[..., Floats]
    ) -> Floats:
        """Return the guided logits, and note whether guidance ends with this token."""
        difference = softmax(logits) - softmax(rows[0])
        agree = 0.5 * float(np.abs(difference).sum()) <= self._stop
        self._end = len(history) if agree else None
        return super().guided(logits, rows, history, edit)

    def _ended(self, size: int) -> bool:
        return self._end is not None and size > self._end
