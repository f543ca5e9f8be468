"""Diverse beam search."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.core import Exactness
from paceline.decoding.strategies.base import SearchOutput, Task
from paceline.decoding.strategies.beam import Beam, beam_search
from paceline.errors import MethodError
from paceline.registry import Source, check_range, strategies


@strategies.register("diverse", Exactness.LOSSY)
@dataclass(frozen=True)
class DiverseBeam(Beam):
    """Beam search in groups, each of which avoids the tokens that the groups before it took.

    At every step, a token costs a group `penalty` nats for each hypothesis of earlier groups that
    took it at that step (the paper's Hamming diversity). The penalty affects the choice only:
    scores are those of `beam`, so that outputs of all groups can be compared. All groups share a
    pass.

    Cost and memory: as `beam` with the same `width`.
    Good for: several answers that differ in more than their last words.

    Attributes:
        groups: number of groups, a divisor of `width`. Default 2.
        penalty: diversity strength in nats, 0 to 1000. Default 0.5, within the paper's 0.2 to 0.8.
        width: hypotheses of all groups. Default 4.
        returned: outputs given, the best of any group. Default 2.
        length_penalty, early_stopping: as in `beam`, for each group by itself.
    """

    returned: int = 2
    groups: int = 2
    penalty: float = 0.5

    examples = ("diverse", "diverse:width=4,groups=4,penalty=1.0")
    source = Source(authors="Vijayakumar et al.", title="Diverse Beam Search", arxiv="1610.02424")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(1, self.width, self.name, groups=self.groups)
        check_range(0, 1000, self.name, penalty=self.penalty)
        if self.width % self.groups:
            raise MethodError(
                f"{self.name}:width is {self.width}, expected a multiple of groups={self.groups}"
            )

    def run(self, task: Task) -> list[SearchOutput]:
        """Return the best `returned` texts of all groups."""
        self.check(task)
        return beam_search(task, self, self.groups, self.penalty)
