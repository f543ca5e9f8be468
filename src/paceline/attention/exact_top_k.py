"""Exact top-k: every key is scored, and the values of the best positions are read."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.attention.base import RunPattern
from paceline.core import Exactness
from paceline.engines.few_read import FewRead
from paceline.registry import Source, patterns


@patterns.register("exact_top_k", Exactness.LOSSY)
@dataclass(frozen=True)
class ExactTopK(RunPattern):
    """Read the values of the positions with the largest scores, for each query head apart.

    An oracle, to judge others by: it reads all keys to choose, so that it saves half of the reading
    at most.

    Attributes:
        share, least, sinks, local, dense: as of `RunPattern`.
    """

    source = Source(note="the choice that sparse attention approximates")
    catalogue = ()
    examples = ("exact_top_k", "exact_top_k:share=0.05,least=64")

    @property
    def few_read(self) -> FewRead:
        """See `RunPattern`."""
        return self.rule("none", top_k=True)
