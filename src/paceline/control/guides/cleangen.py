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
    """Replace tokens that are suspiciously more likely under the model than under a reference.

    A token is suspicious if p(token) >= factor * reference(token), perhaps due to a back door. The
    paper draws from the model, and replaces a suspicious token by one of the reference. The same
    distribution in one draw: other tokens keep their probability, and the total of the suspicious
    ones is distributed as the reference says. At temperature 0 this is the model's best token, or
    the reference's best if that is suspicious, as in the paper.

    The paper's horizon saves passes of the reference: the model drafts k tokens, one pass checks
    them, and what follows the first replaced token is dropped. That is a draft tree, so it needs no
    setting here: the drafter `layer_skip:skip=none,width=1,depth=4,stop=depth`
    with a budget of 4 is the paper's k = 4, and a drafter cheaper than the model saves more.
    The output is that of decoding token by token.

    Attributes:
        reference: folder or hub id of a model without the same back door. Required.
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
        """Open a stream of the reference."""
        stream = models.stream(self.reference, request)
        edit, ranking_edit = (
            partial(self.edit, temperature=temperature)
            for temperature in (request.temperature, 1.0)
        )
        return Guide(edit, [stream], request, ranking_edit)

    def edit(self, logits: Floats, reference: Floats, temperature: float) -> Floats:
        """Return logits [V] that, divided by `temperature`, give the distribution above.

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
