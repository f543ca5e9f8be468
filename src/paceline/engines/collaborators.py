"""What an engine asks of others: memory, which positions it reads, and which layers it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

from paceline.engines.few_read import FewRead
from paceline.engines.sparse_prefill import SparsePrefill

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.engines.base import Engine
    from paceline.models.gated_block import BlockGate, ExitPass


class PageLender(Protocol):
    """Shares one memory limit among several engines; see `shared_limit.SharedLimit`."""

    def lend(self, engine: Engine, pages: int) -> bool:
        """Raise an engine's limit by up to `pages` pages; return whether by any."""
        ...


class LayerExits(Protocol):
    """What an engine asks of `exits.base.ExitPolicy`."""

    name: ClassVar[str]

    def gate(self, nodes: ExitPass) -> BlockGate:
        """Return what decides for the nodes of a pass; see `exits.base.ExitPolicy`."""
        ...


class AttentionPattern(Protocol):
    """What an engine asks of `attention.base.Pattern`."""

    name: ClassVar[str]

    @property
    def few_read(self) -> FewRead | None:
        """Return how runs of 16 positions are chosen; None: `mask` says what is read."""
        ...

    @property
    def sparse_prefill(self) -> SparsePrefill | None:
        """Return how prompts choose blocks of 64 positions; None: they do not."""
        ...

    def head_reads(self, engine: Engine) -> list[list[int]]:
        """Return what each KV head of each layer reads; see `attention.base.Pattern`."""
        ...

    def mask(
        self, layer: int, queries: Tensor, keys: Tensor, at: Tensor, held: Tensor, chain: bool
    ) -> Tensor:
        """Return which rows each query may read; see `attention.base.Pattern`."""
        ...
