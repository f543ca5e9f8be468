"""What an engine asks of others: who lends it memory, and what chooses the positions it reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

from paceline.engines.few_read import FewRead
from paceline.engines.sparse_prefill import SparsePrefill

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.engines.base import Engine


class PageLender(Protocol):
    """Shares one memory limit among several engines; see `shared_limit.SharedLimit`."""

    def lend(self, engine: Engine, pages: int) -> bool:
        """Raise an engine's limit by up to `pages` pages; return whether by any."""
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
