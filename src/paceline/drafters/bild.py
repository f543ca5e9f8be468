"""The big and the little decoder: fewer passes, for another output."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.core import Exactness
from paceline.drafters.base import Drafter, Target
from paceline.drafters.model import DraftModel
from paceline.registry import Source, check_range, drafters


@drafters.register("bild", Exactness.LOSSY)
@dataclass(frozen=True, kw_only=True)
class Bild(DraftModel):
    """Draft as `model`, and accept tokens that the model finds likely enough, if not likeliest.

    The small model writes until it is less certain than `threshold`, which is the paper's fallback.
    Then the large model scores all that was written, and rejects from the first token on that
    surprises it by more than `rollback`. The output is neither model's. Here to be compared with
    `model`, whose output is the large model's own.

    State and cost of a proposal: as `model`. Good for: knowing what exactness costs.

    Based on Kim et al., Big Little Decoder, arXiv 2302.07863.

    Attributes:
        rollback: largest surprise of an accepted token, in nats, 0 to 100. Default 2.0; 0 leaves
            next to nothing of the loss.
        threshold: the fallback: smallest probability that the draft so far is right. Default 0.5.
        path, format, trust, head, schedule, wait, width, depth, stop, rate: as of `model`.
    """

    source = Source(authors="Kim et al.", title="Big Little Decoder", arxiv="2302.07863")
    catalogue = (118,)

    rollback: float = 2.0
    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(0.0, 100.0, "bild", rollback=self.rollback)

    def build(self, target: Target) -> Drafter:
        """Return a drafter whose tokens the loop accepts leniently; see `DraftModel.build`."""
        drafter = super().build(target)
        drafter.rollback = self.rollback
        return drafter
