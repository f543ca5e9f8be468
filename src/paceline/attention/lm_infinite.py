"""LM-Infinite: every position reads the first ones and a window of recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.attention.base import StaticPattern
from paceline.core import Exactness
from paceline.registry import Source, check_range, patterns

if TYPE_CHECKING:
    from torch import Tensor


@patterns.register("lm_infinite", Exactness.LOSSY)
@dataclass(frozen=True)
class LmInfinite(StaticPattern):
    """Attend to the first `sinks` positions and to the last `window`, the query's own included.

    Attributes:
        sinks: first positions that every query reads. Default 4: models put there the attention
            that they have no use for.
        window: recent positions. Default 1024.
    """

    source = Source(authors="Han et al.", title="LM-Infinite", arxiv="2308.16137", section="3.2")
    catalogue = (305,)
    missing = {305: "the limit on distances, which lets texts outgrow the trained context"}
    examples = ("lm_infinite", "lm_infinite:sinks=2,window=16")

    sinks: int = 4
    window: int = 1024

    def __post_init__(self) -> None:
        check_range(0, 1 << 30, self.name, sinks=self.sinks)
        check_range(1, 1 << 30, self.name, window=self.window)

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return the first positions and the window of each query."""
        return (keys < self.sinks) | (queries[:, None] - keys < self.window)
