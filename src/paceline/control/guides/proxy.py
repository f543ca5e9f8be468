"""Proxy tuning."""

from __future__ import annotations

from dataclasses import dataclass, field

from paceline.control.base import require
from paceline.control.guides.base import Guide, GuideMethod
from paceline.control.guides.guide_models import GuideModels
from paceline.core import Control, Exactness, Floats, Request
from paceline.registry import Source, guides


@guides.register("proxy", Exactness.EXACT)
@dataclass(frozen=True, kw_only=True)
class ProxyTuning(GuideMethod):
    """Add the effect of tuning a small model: logits + alpha * (tuned - base).

    The large model is steered like the small tuned one, without a change to its weights.

    Attributes:
        tuned: folder or hub id of the small tuned model. Required.
        base: folder or hub id of the same model before tuning. Required.
        alpha: strength, -100 to 100. Default 1, the paper's.
    """

    tuned: str = field()
    base: str = field()
    alpha: float = 1.0

    order = 2
    passes = "one of `tuned`, one of `base`"
    source = Source(
        authors="Liu et al.",
        title="Tuning Language Models by Proxy",
        arxiv="2401.08565",
        section="equation 1",
    )
    catalogue = (490,)

    def __post_init__(self) -> None:
        require(abs(self.alpha) <= 100, "proxy:alpha", self.alpha, "-100 to 100")

    def bind(self, request: Request, models: GuideModels) -> Control:
        """Open streams of both models."""
        streams = [models.stream(self.tuned, request), models.stream(self.base, request)]
        return Guide(self.edit, streams, request)

    def edit(self, logits: Floats, tuned: Floats, base: Floats) -> Floats:
        """Return the guided logits [V]."""
        guided: Floats = logits + self.alpha * (tuned - base)
        return guided
