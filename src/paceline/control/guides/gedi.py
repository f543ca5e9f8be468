"""GeDi."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from paceline.control.base import require
from paceline.control.guides.base import GuideMethod, Logs, log_softmax
from paceline.control.guides.bayes.class_guide import ClassGuide, Sums, wanted
from paceline.control.guides.guide_models import GuideModels
from paceline.core import Control, Exactness, Floats, Request
from paceline.registry import Source, guides


@guides.register("gedi", Exactness.EXACT)
@dataclass(frozen=True, kw_only=True)
class Gedi(GuideMethod):
    """Prefer tokens after which a class is likelier, by Bayes' rule over a class-conditional model.

    p(token) * P(class | text, token) ** omega, where the class's chance is made of what a small
    model gives the text and the token behind the code of the class, against the code of its
    opposite, both to the power alpha / length. Then tokens are left out that speak against the
    class: in order of its chance, the last 1 - rho of the mass, but none above tau.

    The whole text counts, its first token apart; a code stands behind a BOS token. Both classes are
    taken to be as likely at first.

    Attributes:
        model: folder or hub id of a class-conditional model with the same tokens. Required.
        positive: code of the class, as text or in JSON quotes. Required.
        negative: code of its opposite. Required.
        omega: strength, 0 to 1000. Default 30, the paper's.
        rho: mass that is kept at least, 0 to 1; 1 leaves out nothing. Default 0.8, the paper's.
        tau: chance of the class above which a token is kept, 0 to 1. Default 0.8, the paper's.
        alpha: scale of the length-normalised evidence, 0 to 1000. Default 1: a trained GeDi brings
            its own.
    """

    model: str = field()
    positive: str = field()
    negative: str = field()
    omega: float = 30.0
    rho: float = 0.8
    tau: float = 0.8
    alpha: float = 1.0

    order = 3
    passes = "two of `model`, one for each class"
    source = Source(
        authors="Krause et al.", title="GeDi", arxiv="2009.06367", section="sections 3.1 and 3.2"
    )
    catalogue = (127,)

    def __post_init__(self) -> None:
        for name, largest in {"omega": 1000.0, "rho": 1.0, "tau": 1.0, "alpha": 1000.0}.items():
            value = getattr(self, name)
            require(0 <= value <= largest, f"gedi:{name}", value, f"0 to {largest:g}")

    def bind(self, request: Request, models: GuideModels) -> Control:
        """With two texts of the model."""
        codes = (self.positive, self.negative)
        streams = [models.lag(self.model, code, request) for code in codes]
        return ClassGuide(self.edit, log_softmax, streams, request, first=1)

    def edit(self, logits: Floats, scores: list[Logs], sums: Sums, count: int) -> Floats:
        """The formula above; `scores` are log chances of every token [V] in each class."""
        scale = self.alpha / (count + 1)
        class_log_prob = wanted(
            [scale * (score + s) for score, s in zip(scores, sums, strict=True)]
        )
        weighed = log_softmax(logits) + self.omega * class_log_prob
        order = np.argsort(class_log_prob, kind="stable")
        mass = np.exp(log_softmax(weighed))[order].cumsum()
        with np.errstate(divide="ignore"):
            against = (mass < 1 - self.rho) & (class_log_prob[order] < np.log(self.tau))
        weighed[order[against]] = -np.inf
        return weighed.astype(np.float32)
