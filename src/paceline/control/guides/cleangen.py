"""CleanGen."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np

from paceline.control.base import require
from paceline.control.guides.base import Guide, GuideMethod, log_softmax
from paceline.control.guides.guide_models import GuideModels
from paceline.core import Control, Exactness, Floats, Request
from paceline.registry import Source, guides


@guides.register("cleangen", Exactness.EXACT)
@dataclass(frozen=True, kw_only=True)
class CleanGen(GuideMethod):
    """Replace tokens that the model likes suspiciously more than a reference does.

    A token is suspicious where p(token) >= factor * reference(token): a back door, perhaps. The
    paper draws, and where the token is suspicious takes the reference's instead. The law of that,
    in one draw: every token keeps its chance unless suspicious, and the chance of all suspicious
    ones together is spread by the reference. At temperature 0 its limit: the model's best token,
    or the reference's best if that is suspicious; so does the paper.

    The paper's horizon is a way to save passes of the reference: the model drafts k tokens, one
    pass checks them, and what follows the first replaced one is dropped. That is a draft tree, so
    no setting of its own is needed: the drafter `layer_skip:skip=none,width=1,depth=4,stop=depth`
    with a budget of 4 is the paper's k = 4, and a drafter cheaper than the model saves more.
    The output stays that of token by token, replacements drawn as everything else.

    Attributes:
        reference: folder or hub id of a model that nobody tampered with in the same way. Required.
        factor: 1 to a million. Default 20, the paper's alpha.
    """

    reference: str = field()
    factor: float = 20.0

    order = 1
    passes = "one of `reference`"
    source = Source(
        authors="Li et al.", title="CleanGen", arxiv="2406.12257", section="algorithm 1"
    )
    catalogue = (226,)

    def __post_init__(self) -> None:
        require(1 <= self.factor <= 1e6, "cleangen:factor", self.factor, "1 to 1000000")

    def bind(self, request: Request, models: GuideModels) -> Control:
        """With the reference beside the target."""
        stream = models.stream(self.reference, request)
        edit, ranking_edit = (
            partial(self.edit, temperature=temperature)
            for temperature in (request.temperature, 1.0)
        )
        return Guide(edit, [stream], request, ranking_edit)

    def edit(self, logits: Floats, reference: Floats, temperature: float) -> Floats:
        """The logits [V] that, divided by `temperature`, are the law above.

        Suspicion is judged at temperature 1; token and replacement are drawn at `temperature`.
        """
        odds = log_softmax(logits) - log_softmax(reference)
        suspicious = odds >= np.log(self.factor)
        if not suspicious.any():
            return logits
        if temperature == 0:
            return reference if suspicious[logits.argmax()] else logits
        own, other = log_softmax(logits / temperature), log_softmax(reference / temperature)
        with np.errstate(divide="ignore"):
            spread = other + np.log(np.exp(own[suspicious]).sum())
        mixed = np.logaddexp(np.where(suspicious, -np.inf, own), spread)
        tempered: Floats = (temperature * mixed).astype(np.float32)
        return tempered
