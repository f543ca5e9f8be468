"""Contrastive decoding."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from paceline.control.base import require
from paceline.control.guides.base import Guide, GuideMethod, plausible
from paceline.control.guides.guide_models import GuideModels
from paceline.core import Control, Exactness, Floats, Request
from paceline.registry import Source, guides


@guides.register("contrastive", Exactness.EXACT)
@dataclass(frozen=True, kw_only=True)
class ContrastiveDecoding(GuideMethod):
    """Prefer tokens that the model rates above a weaker one: (1 + beta) * logits - beta * amateur.

    Only tokens at least alpha times as likely as the model's best are kept, so that tokens which
    both models find unlikely are not rewarded for their difference.

    Attributes:
        amateur: folder or hub id of the weaker model. Required.
        alpha: 0 to 1. Default 0.1, as in both papers.
        beta: strength, 0 to 100. Default 0.5, as of O'Brien and Lewis; the first paper's
            log p - log p_amateur is its limit.
    """

    amateur: str = field()
    alpha: float = 0.1
    beta: float = 0.5

    order = 1
    passes = "one of `amateur`"
    source = Source(
        authors="Li et al.",
        title="Contrastive Decoding",
        arxiv="2210.15097",
        note="this form: O'Brien and Lewis, arXiv 2309.09117, section 2",
    )

    def __post_init__(self) -> None:
        require(0 <= self.alpha <= 1, "contrastive:alpha", self.alpha, "0 to 1")
        require(0 <= self.beta <= 100, "contrastive:beta", self.beta, "0 to 100")

    def bind(self, request: Request, models: GuideModels) -> Control:
        """Open a stream of the amateur."""
        return Guide(self.edit, [models.stream(self.amateur, request)], request)

    def edit(self, logits: Floats, amateur: Floats) -> Floats:
        """Return the guided logits [V]."""
        guided = logits + self.beta * (logits - amateur)
        return np.where(plausible(logits, self.alpha), guided, -np.inf).astype(np.float32)
