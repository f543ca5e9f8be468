"""InfLLM: distant runs are looked up by a few of their keys, which stand for them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from paceline.attention.base import RunPattern, runs_of
from paceline.core import Exactness
from paceline.engines.few_read import RUN, FewRead
from paceline.errors import MethodError
from paceline.registry import Source, check_range, patterns


@patterns.register("infllm", Exactness.LOSSY)
@dataclass(frozen=True)
class InfLLM(RunPattern):
    """Read the last positions, and those distant runs whose representatives fit the query best.

    A run of 16 positions is represented by those of its keys that the queries of the `following`
    positions scored highest, and by the mean of its other keys. It promises the sum of the weights
    of these. Positions stay those of the text.

    Attributes:
        representatives: keys that stand for themselves, up to 16. Default 4, as in the paper.
        following: positions behind a run whose queries choose them; less than `local`, and trees
            must end within the difference. Default 64.
        local: last positions, which are always read. Default 128.
        share, least, sinks, dense: as of `RunPattern`.
    """

    source = Source(
        authors="Xiao et al.",
        title="InfLLM",
        arxiv="2402.04617",
        section="3",
        note="units of 16 positions, not 128; a unit's other keys count by their mean, and scores "
        "are added as weights; every query looks up for itself",
    )
    catalogue = (323,)
    missing = {323: "distant units in slower memory, and one position for all of them"}
    examples = ("infllm", "infllm:representatives=2,share=0.2,least=0,local=48,following=16")

    local: int = 128
    representatives: int = 4
    following: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(1, RUN, self.name, representatives=self.representatives)
        check_range(1, 1 << 30, self.name, following=self.following)
        if runs_of(self.following) >= runs_of(self.local):
            raise MethodError(
                f"{self.name}:following is {self.following}, expected at least {RUN} positions "
                f"less than local, which is {self.local}"
            )

    @property
    def few_read(self) -> FewRead:
        """See `RunPattern`."""
        return replace(
            self.rule("representatives"),
            representatives=self.representatives,
            following=runs_of(self.following),
        )
