"""MInference: each head reads a prompt by the pattern that a profile found for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from paceline.attention.base import PrefillPattern
from paceline.core import Exactness
from paceline.engines.head_profile import read_profile
from paceline.engines.sparse_prefill import BLOCK, HeadRule, PrefillRule, SparsePrefill
from paceline.registry import Source, check_range, patterns


@patterns.register("minference", Exactness.LOSSY)
@dataclass(frozen=True)
class MInference(PrefillPattern):
    """Read a prompt in each head by its own pattern: A-shape, vertical-slash or block-sparse.

    Besides the first and the last blocks a block of queries reads, by the pattern of its head: the
    positions just before (A-shape); the distances to which its sampled queries attend most, and
    the positions with most of their attention besides (vertical-slash); or the blocks whose mean
    keys fit its mean query (block-sparse). All read about as much. `paceline profile-heads` finds
    the pattern of each head once, for one text: the one whose output is nearest to full attention.

    Attributes:
        profile: a file that `paceline profile-heads` wrote for the same model; empty: all heads are
            vertical-slash.
        budget: positions that a head without a profile reads besides the first and the last
            blocks. Default 1024.
        vertical: share of them that single positions take, the others by distance, 0 to 1.
            Default 0.5.
        samples, sinks, local, dense: as of `PrefillPattern`.
    """

    source = Source(
        authors="Jiang et al.",
        title="MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse "
        "Attention",
        arxiv="2407.02490",
        section="3",
        note="each block of 64 queries chooses its own lines by a few of its queries; the paper "
        "chooses them once, by the last 64 queries of the prompt, which are not known yet where a "
        "prompt is run in chunks",
    )
    catalogue = (297,)
    examples = ("minference", "minference:budget=128,samples=2,local=1", "minference:vertical=0.25")

    profile: str = ""
    budget: int = 1024
    vertical: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(BLOCK, 1 << 24, self.name, budget=self.budget)
        check_range(0, 1, self.name, vertical=self.vertical)
        self._heads  # noqa: B018 (a profile that cannot be read is refused at once)

    @cached_property
    def _heads(self) -> tuple[tuple[HeadRule, ...], ...]:
        return read_profile(self.profile, self.name) if self.profile else ()

    @property
    def sparse_prefill(self) -> SparsePrefill:
        """See `PrefillPattern`."""
        columns = round(self.vertical * self.budget)
        every = HeadRule(PrefillRule.VERTICAL_SLASH, columns, self.budget - columns)
        return SparsePrefill(
            self.samples, 1.0, self.sinks, self.local, self.dense, every, self._heads
        )
