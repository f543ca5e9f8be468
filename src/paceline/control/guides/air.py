"""Air-Decoding."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from paceline.control.base import require
from paceline.control.guides.base import GuideMethod, Logs, log_softmax
from paceline.control.guides.bayes.class_guide import ClassGuide, Sums, class_log_probs
from paceline.control.guides.guide_models import GuideModels
from paceline.core import Control, Exactness, Floats, Request
from paceline.registry import Source, guides

_SURE = 1e-9  # nats; at probability 1 the reconstruction would be infinite


@guides.register("air", Exactness.EXACT)
@dataclass(frozen=True, kw_only=True)
class Air(GuideMethod):
    """Prefer an attribute by Bayes' rule over reconstructed distributions: -1 / log p for p.

    The distribution is p(token) * P(attribute | text, token) ** omega, as in `gedi`, but the
    probabilities of both classes are flattened before they are compared. So words that only the
    attribute's model prefers do not rule out all others, and the text stays fluent at a large
    omega. The evidence of the output's tokens is summed without normalisation by length; the
    prompt does not count.

    Attributes:
        model: folder or hub id of a class-conditional model with the same tokenizer. The paper
            tunes a prefix for each class; here a text names the class. Required.
        positive: text that names the attribute. Required.
        negative: text that names its opposite. Required.
        omega: strength, 0 to 1000. Default 20, as in the authors' program.
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
    missing = {92: "prefix-tuned class models; classes are named by text"}

    def __post_init__(self) -> None:
        require(0 <= self.omega <= 1000, "air:omega", self.omega, "0 to 1000")

    def bind(self, request: Request, models: GuideModels) -> Control:
        """Open a stream of the model for each class."""
        codes = (self.positive, self.negative)
        streams = [models.conditioned(self.model, code, request) for code in codes]
        first = max(len(request.prompt), 1)
        return ClassGuide(self.edit, reconstructed, streams, request, first)

    def edit(self, logits: Floats, scores: list[Logs], sums: Sums, count: int) -> Floats:
        """Return the guided logits [V]; `scores` are log reconstructed probabilities by class."""
        class_log_prob = class_log_probs([score + s for score, s in zip(scores, sums, strict=True)])
        weighed = log_softmax(logits) + self.omega * class_log_prob
        return weighed.astype(np.float32)


def reconstructed(logits: Floats) -> Logs:
    """Return log(-1 / log p) for every token, [V]."""
    scores: Logs = -np.log(np.maximum(-log_softmax(logits), _SURE))
    return scores
