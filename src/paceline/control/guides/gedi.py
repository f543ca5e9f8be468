"""GeDi."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from paceline.control.base import require
from paceline.control.guides.base import GuideMethod, Logs, log_softmax
from paceline.control.guides.bayes.class_guide import ClassGuide, Sums, class_log_probs
from paceline.control.guides.guide_models import GuideModels
from paceline.core import Control, Exactness, Floats, Request
from paceline.registry import Source, guides


@guides.register("gedi", Exactness.EXACT)
@dataclass(frozen=True, kw_only=True)
class Gedi(GuideMethod):
    """Prefer tokens after which a class is likelier, by Bayes' rule over a class-conditional model.

    The distribution is p(token) * P(class | text, token) ** omega. The probability of the class
    comes from a small model: the likelihood of text and token after the code of the class, against
    that after the code of its opposite, both to the power alpha / length. Then tokens that speak
    against the class are dropped: in order of the class's probability, the last 1 - rho of the
    mass, but none with a class probability above tau.

    All of the text counts but its first token; a code follows a BOS token. Both classes have prior
    1/2.

    Attributes:
        model: folder or hub id of a class-conditional model with the same tokenizer. Required.
        positive: code of the class. Required.
        negative: code of its opposite. Required.
        omega: strength, 0 to 1000. Default 30, the paper's.
        rho: probability mass that is kept at least, 0 to 1; 1 drops nothing. Default 0.8, as in the
            paper.
        tau: class probability above which a token is kept, 0 to 1. Default 0.8, the paper's.
        alpha: scale of the length-normalised evidence, 0 to 1000. Default 1: a trained GeDi has
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
        """Open a stream of the model for each class."""
        codes = (self.positive, self.negative)
        streams = [models.conditioned(self.model, code, request) for code in codes]
        return ClassGuide(self.edit, log_softmax, streams, request, first=1)

    def edit(self, logits: Floats, scores: list[Logs], sums: Sums, count: int) -> Floats:
        """Return the guided logits [V]; `scores` are log-probabilities of tokens by class."""
        scale = self.alpha / (count + 1)
        class_log_prob = class_log_probs(
            [scale * (score + s) for score, s in zip(scores, sums, strict=True)]
        )
        weighed = log_softmax(logits) + self.omega * class_log_prob
        order = np.argsort(class_log_prob, kind="stable")
        mass = np.exp(log_softmax(weighed))[order].cumsum()
        with np.errstate(divide="ignore"):
            against = (mass < 1 - self.rho) & (class_log_prob[order] < np.log(self.tau))
        weighed[order[against]] = -np.inf
        return weighed.astype(np.float32)
