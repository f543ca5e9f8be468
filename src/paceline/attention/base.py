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
from paceline.engines.base import Engine
from paceline.engines.few_read import RUN, FewRead, HeadRead
from paceline.engines.sparse_prefill import SparsePrefill
from paceline.errors import RequestError
from paceline.registry import Method, check_range

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 64  # positions of an aligned block


def runs_of(positions: int) -> int:
    """Return the number of runs of 16 that hold so many positions."""
    return -(-positions // RUN)


@dataclass(frozen=True)
class Pattern(Method, ABC):
    """Settings of a pattern: its fields. Positions that the model itself hides stay hidden."""

    needs: ClassVar[frozenset[Ability]] = frozenset({Ability.TORCH})

    @property
    def few_read(self) -> FewRead | None:
        """Return how runs of 16 positions are chosen; None: `mask` says what is read."""
        return None

    @property
    def sparse_prefill(self) -> SparsePrefill | None:
        """Return how prompts choose blocks of 64 positions, and nothing else does; None: no way."""
        return None

    def head_reads(self, engine: Engine) -> list[list[int]]:
        """Return one of `HeadRead` for each KV head of each layer. Called once, with the weights.

        Until it returns, the engine reads every position.
        """
        return [[HeadRead.CHOSEN] * layer.kv_heads for layer in engine.config.layers]

    @abstractmethod
    def mask(
        self, layer: int, queries: Tensor, keys: Tensor, at: Tensor, held: Tensor, chain: bool
    ) -> Tensor:
        """Return which rows each query may read, bool [H, N, S], or [1, N, S] for all heads alike.

        A pattern that weighs what it reads returns in their place what is added to scores, float.

        Args:
            layer: index of the layer.
            queries: [H, N, D], rotated and scaled.
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


@dataclass(frozen=True)
class RunPattern(Pattern):
    """A pattern that reads few of the cached positions while decoding, in runs of 16.

    A prompt reads everything; from its last token on, every query chooses for itself. A method
    says in `few_read` by what. Both engines run it; the native one reads what was chosen in place.

    Attributes:
        share: of the positions before a query, how many it reads, sinks and local ones included.
            Default 0.1.
        least: positions that it reads at least, likewise; the larger counts. Default 256.
        sinks: first positions, which are always read. Default 16.
        local: last positions, which are always read; a tree must end within them. Default 64.
        dense: first layers that read everything. Default 0.
    """

    needs: ClassVar[frozenset[Ability]] = frozenset()

    share: float = 0.1
    least: int = 256
    sinks: int = 16
    local: int = 64
    dense: int = 0

    def __post_init__(self) -> None:
        check_range(0, 1, self.name, share=self.share)
        check_range(0, 1 << 30, self.name, least=self.least, sinks=self.sinks)
        check_range(RUN, 1 << 30, self.name, local=self.local)
        check_range(0, 1 << 20, self.name, dense=self.dense)

    @property
    @abstractmethod
    def few_read(self) -> FewRead:
        """Return how positions are chosen."""

    def rule(self, summary: str, top_k: bool = False) -> FewRead:
        """Return the settings as numbers of runs."""
        least, sinks, local = runs_of(self.least), runs_of(self.sinks), runs_of(self.local)
        return FewRead(summary, top_k, sinks, local, least, self.share)

    def head_reads(self, engine: Engine) -> list[list[int]]:
        """Let the first `dense` layers read everything, and all others choose."""
        return [
            [HeadRead.ALL if index < self.dense else HeadRead.CHOSEN] * layer.kv_heads
            for index, layer in enumerate(engine.config.layers)
        ]

    def mask(
        self, layer: int, queries: Tensor, keys: Tensor, at: Tensor, held: Tensor, chain: bool
    ) -> Tensor:
        """See `Pattern`; in a layer without a window, whose heads all choose.

        Raises:
            NotImplementedError: the choice depends on more than these arguments.
        """
        if self.few_read.remembers:
            raise NotImplementedError(f"the engine itself chooses what {self.name} reads")
        from paceline.engines.choose_runs import choose_runs

        reads = [HeadRead.CHOSEN] * len(keys)
        return choose_runs(self.few_read, queries, keys, at, held, chain, None, reads)


@dataclass(frozen=True)
class PrefillPattern(Pattern):
    """A pattern that reads less of a prompt: each block of 64 queries chooses for itself.

    What follows the last whole block of a prompt, and all that is decoded, reads everything. A
    method says in `sparse_prefill` how blocks choose. Both engines run it.

    Attributes:
        samples: queries of a block that choose, 1 to 64. Default 4.
        sinks: first blocks that are always read. Default 1.
        local: last blocks that are always read, the query's own included. Default 4.
        dense: first layers that read everything. Default 0.
    """

    needs: ClassVar[frozenset[Ability]] = frozenset()

    samples: int = 4
    sinks: int = 1
    local: int = 4
    dense: int = 0

    def __post_init__(self) -> None:
        check_range(1, BLOCK, self.name, samples=self.samples)
        check_range(0, 1 << 20, self.name, sinks=self.sinks, dense=self.dense)
        check_range(1, 1 << 20, self.name, local=self.local)

    @property
    @abstractmethod
    def sparse_prefill(self) -> SparsePrefill:
        """Return how blocks of a prompt choose what they read."""

    def mask(
        self, layer: int, queries: Tensor, keys: Tensor, at: Tensor, held: Tensor, chain: bool
    ) -> Tensor:
        """See `Pattern`; of a prompt that ends with the last query, without a soft cap."""
        from paceline.engines.choose_blocks import choose_blocks

        rule, prompt = self.sparse_prefill, int(at[-1]) + 1
        heads = rule.heads[layer] if rule.heads else [rule.every] * len(queries)
        return choose_blocks(rule, queries, keys, at, held, prompt, None, heads)


def _block_starts(count: int, like: Tensor) -> torch.Tensor:
    import torch

    return torch.arange(count, device=like.device) * BLOCK
