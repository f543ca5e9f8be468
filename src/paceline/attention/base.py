"""The contract of an attention pattern: which cached positions each query reads.

A pattern is a function of a node's own path: of its query and of the keys before it, never of the
rest of the tree. So speculation, chunks and batches cannot change what a node reads, and with a
pattern on, every drafter gives the output of plain decoding with that pattern.

Axes: N queries, S rows of keys, H query heads, G key/value heads, D head size, K blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from paceline.abilities import Ability
from paceline.errors import RequestError
from paceline.registry import Method, check_range

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 64  # positions of an aligned block


@dataclass(frozen=True)
class Pattern(Method, ABC):
    """Settings of a pattern: its fields. Positions that the model itself hides stay hidden."""

    needs: ClassVar[frozenset[Ability]] = frozenset({Ability.TORCH})

    @abstractmethod
    def mask(
        self, layer: int, queries: Tensor, keys: Tensor, at: Tensor, held: Tensor, chain: bool
    ) -> Tensor:
        """Return which rows each query may read, bool [H, N, S], or [1, N, S] for all heads alike.

        Args:
            layer: index of the layer.
            queries: [H, N, D], rotated.
            keys: [G, S, D], rotated: the committed rows, and behind them those of the pass.
            at: int64 [N], positions of the queries.
            held: int64 [S], positions of the rows.
            chain: the pass is a chain, so that all rows are in the order of their positions.
        """


@dataclass(frozen=True)
class StaticPattern(Pattern):
    """A pattern of positions alone."""

    @abstractmethod
    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return which positions keys [S] each position queries [N] reads, bool [N, S]."""

    def mask(
        self, layer: int, queries: Tensor, keys: Tensor, at: Tensor, held: Tensor, chain: bool
    ) -> Tensor:
        """See `Pattern`."""
        return self.visible(at, held)[None]


@dataclass(frozen=True)
class BlockPattern(Pattern):
    """A pattern that chooses among whole blocks of 64 positions by what is in them.

    Attributes:
        sinks: first positions that are always read. Default 64.
        local: last blocks that are always read, the query's own included, at least 2: rows of the
            tree itself are always among them. Default 4.
    """

    sinks: int = 64
    local: int = 4

    def __post_init__(self) -> None:
        check_range(0, 1 << 30, self.name, sinks=self.sinks)
        check_range(2, 1 << 24, self.name, local=self.local)

    @abstractmethod
    def blocks(self, layer: int, queries: Tensor, keys: Tensor, old: Tensor) -> Tensor:
        """Return which blocks each query reads, bool [H, N, K].

        Args:
            layer: index of the layer.
            queries: [H, N, D].
            keys: [G, K, D], the mean key of each block.
            old: bool [N, K], the blocks to choose from: those before a query's `local` ones.
        """

    def mask(
        self, layer: int, queries: Tensor, keys: Tensor, at: Tensor, held: Tensor, chain: bool
    ) -> Tensor:
        """See `Pattern`."""
        first = (at // BLOCK - self.local + 1) * BLOCK  # where a query's local blocks begin
        near = (held >= first[:, None]) | (held < self.sinks)
        ordered = len(held) if chain else len(held) - len(at)
        count = ordered // BLOCK
        if not chain and int((first - ordered).max()) > 0:
            raise RequestError(
                f"{self.name} needs trees that end within its {self.local} local blocks of {BLOCK} "
                "positions; take a smaller budget"
            )
        old = _block_starts(count, at)[None] + BLOCK <= first[:, None]
        if not count or not bool(old.any()):
            return near[None]
        means = keys[:, : count * BLOCK].reshape(len(keys), count, BLOCK, -1).float().mean(2)
        chosen = self.blocks(layer, queries, means, old) & old
        rows = near.expand(len(queries), -1, -1).clone()
        rows[..., : count * BLOCK] |= chosen.repeat_interleave(BLOCK, -1)
        return rows


def _block_starts(count: int, like: Tensor) -> torch.Tensor:
    import torch

    return torch.arange(count, device=like.device) * BLOCK
