"""Air-Decoding."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from paceline.control.base import require
from paceline.control.guides.base import GuideMethod, Logs, log_softmax
from paceline.control.guides.bayes.class_guide import ClassGuide, Sums, wanted
from paceline.control.guides.guide_models import GuideModels
from paceline.core import Control, Exactness, Floats, Request
from paceline.registry import Source, guides

_SURE = 1e-9  # nats; the reconstruction of a token that is certain would be infinite


@guides.register("air", Exactness.EXACT)
@dataclass(frozen=True, kw_only=True)
class Air(GuideMethod):
    """Prefer an attribute by Bayes' rule over reconstructed distributions: -1 / log p for p.

    p(token) * P(attribute | text, token) ** omega, as in `gedi`, but both classes' chances are
    flattened before they are compared. So words that only the attribute's model likes do not rule
    all others out, and the text stays fluent under a large omega. The tokens written so far count
    as they are, without regard to their number; the prompt does not.

    Attributes:
        model: folder or hub id of a class-conditional model with the same tokens. The paper tunes
            a prefix for each class; here the class is named by text. Required.
        positive: text that stands for the attribute. Required.
        negative: that of its opposite. Required.
        omega: strength, 0 to 1000. Default 20, that of the authors' program.
    """

    model: str = field()
    positive: str = field()
    negative: str = field()
    omega: float = 20.0

    order = 3
    passes = "two of `model`, one for each class"
    source = Source(
        authors="Zhong et al.", title="Air-Decoding", arxiv="2310.14892", section="section 3"
    )
    catalogue = (92,)

    def __post_init__(self) -> None:
        require(0 <= self.omega <= 1000, "air:omega", self.omega, "0 to 1000")

    def bind(self, request: Request, models: GuideModels) -> Control:
        """With two texts of the model."""
        codes = (self.positive, self.negative)
        streams = [models.lag(self.model, code, request) for code in codes]
        first = max(len(request.prompt), 1)
        return ClassGuide(self.edit, reconstructed, streams, request, first)

    def edit(self, logits: Floats, scores: list[Logs], sums: Sums, count: int) -> Floats:
        """The formula above; `scores` are the logs of reconstructed chances [V] in each class."""
        class_log_prob = wanted([score + s for score, s in zip(scores, sums, strict=True)])
        weighed = log_softmax(logits) + self.omega * class_log_prob
        return weighed.astype(np.float32)


def reconstructed(logits: Floats) -> Logs:
    """log(-1 / log p) for every token [V]."""
    found: Logs = -np.log(np.maximum(-log_softmax(logits), _SURE))
    return found
