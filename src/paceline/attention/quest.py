"""Quest: pages of 16 positions are chosen by the bounds of their keys."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.attention.base import RunPattern
from paceline.core import Exactness
from paceline.engines.few_read import FewRead
from paceline.errors import MethodError, unknown
from paceline.registry import Source, patterns

_SUMMARIES = ("bounds", "mean", "spread")


@patterns.register("quest", Exactness.LOSSY)
@dataclass(frozen=True)
class Quest(RunPattern):
    """Read the pages whose keys may have the largest products with the query.

    A page of 16 positions keeps the minimum and maximum of its keys in each dimension: an upper
    bound of any of its scores. The mean of its keys costs half as much to compare with. `spread`
    adds to the score of the mean each dimension's variance times the squared query, so that a page
    with one fitting key counts for more.

    Attributes:
        summary: `bounds` as in the paper, `mean`, or `spread`. Default bounds.
        share, least, sinks, local, dense: as of `RunPattern`.
    """

    source = Source(
        authors="Tang et al.",
        title="Quest",
        arxiv="2406.10774",
        section="3.3",
        note="query heads that share keys choose together, by the sum of the weights that pages "
        "would have; first layers choose, too, unless `dense` says otherwise",
    )
    catalogue = ()
    examples = ("quest", "quest:summary=mean,share=0.25", "quest:summary=spread,least=32,local=32")

    summary: str = "bounds"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.summary not in _SUMMARIES:
            raise MethodError(unknown("quest:summary", self.summary, _SUMMARIES))

    @property
    def few_read(self) -> FewRead:
        """See `RunPattern`."""
        return self.rule(self.summary)
