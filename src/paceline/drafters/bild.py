"""The big and the little decoder: fewer passes for another output."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.core import Exactness
from paceline.drafters.base import Drafter, Target
from paceline.drafters.model import DraftModel
from paceline.registry import Source, check_range, drafters


@drafters.register("bild", Exactness.LOSSY)
@dataclass(frozen=True, kw_only=True)
class Bild(DraftModel):
    """As `model`, but a guess stands that the model finds likely enough, if not likeliest.

    The small model writes until it is less sure than `threshold`, which is the paper's fallback;
    then the large model looks at all it wrote, and takes back what surprises it by more than
    `rollback`. The output is neither model's. Here to be compared with `model`, whose output is
    the large model's own.

    State and cost of a proposal: as `model`. Good for: knowing what exactness costs.

    Attributes:
        rollback: surprise of the large model, in nats, up to which a guess stands. Default 2.0; 0
            leaves next to nothing of the loss.
        path, format, trust, width, depth, stop, rate: as of `model`.
        threshold: the fallback: least chance that what was drafted is right so far. Default 0.5.
    """

    source = Source(authors="Kim et al.", title="Big Little Decoder", arxiv="2302.07863")
    catalogue = (118,)

    rollback: float = 2.0
    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(0.0, 100.0, "bild", rollback=self.rollback)

    def build(self, target: Target) -> Drafter:
        """A drafter whose guesses the loop treats leniently."""
        drafter = super().build(target)
        drafter.rollback = self.rollback
        return drafter
