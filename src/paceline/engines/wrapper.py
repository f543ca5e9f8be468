"""An engine that stands in front of another one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paceline.core import Floats, Tokens, TokenTree
from paceline.engines.base import Cached, Engine, Rows
from paceline.engines.collaborators import AttentionPattern, LayerExits, PageLender
from paceline.engines.pages import Memory
from paceline.engines.part import Part
from paceline.engines.view import View


class EngineWrapper(Engine):
    """Forwards every operation and attribute to another engine; subclasses override what differs.

    `start`, `extend` and `forward_screened` are not forwarded: they are made of `open`, `forward`
    and `commit`, and so pass through what a subclass overrides. Nor are `begin`, `finish`,
    `abandon` and `passes_in_flight`: a wrapped engine runs one pass at a time.

    Args:
        inner: the engine that does the work. Sequences are its own.
    """

    def __init__(self, inner: Engine) -> None:
        self.inner = inner
        self.name, self.config, self.format = inner.name, inner.config, inner.format
        self.kv_format, self.invariant = inner.kv_format, inner.invariant
        self.tolerance, self.abilities = inner.tolerance, inner.abilities

    @property
    def shared(self) -> PageLender | None:
        """Whoever lends the inner engine its limit."""
        return self.inner.shared

    @shared.setter
    def shared(self, lender: PageLender | None) -> None:
        self.inner.shared = lender

    @property
    def part(self) -> Part | None:  # type: ignore[override]  # an attribute there
        """Layers that are run; see `Engine.part`."""
        return self.inner.part

    @property
    def remote_layers(self) -> int:  # type: ignore[override]  # an attribute there
        """Layers that other processes run; see `Engine.remote_layers`."""
        return self.inner.remote_layers

    @property
    def pattern(self) -> AttentionPattern | None:  # type: ignore[override]  # an attribute there
        """Attention pattern; see `Engine.pattern`."""
        return self.inner.pattern

    @property
    def exits(self) -> LayerExits | None:  # type: ignore[override]  # an attribute there
        """Exit policy; see `Engine.exits`."""
        return self.inner.exits

    @property
    def weight_bytes(self) -> int | None:  # type: ignore[override]  # an attribute there
        """Size of the weights; see `Engine.weight_bytes`."""
        return self.inner.weight_bytes

    @property
    def shared_bytes(self) -> int:  # type: ignore[override]  # an attribute there
        """Weights that several layers share; see `Engine.shared_bytes`."""
        return self.inner.shared_bytes

    @property
    def streamed_bytes(self) -> int:  # type: ignore[override]  # an attribute there
        """Weights that each pass reads from a file; see `Engine.streamed_bytes`."""
        return self.inner.streamed_bytes

    @property
    def weights_memory(self) -> int | None:  # type: ignore[override]  # an attribute there
        """Most bytes of weights in memory; see `Engine.weights_memory`."""
        return self.inner.weights_memory

    @property
    def screens_drafts(self) -> bool:  # type: ignore[override]  # an attribute there
        """Whether passes with drafts read the head in part; see `Engine.screens_drafts`."""
        return self.inner.screens_drafts

    @property
    def open_pages(self) -> int:  # type: ignore[override]  # an attribute there
        """Further pages of a sequence; see `Engine.open_pages`."""
        return self.inner.open_pages

    @property
    def head_share(self) -> float:  # type: ignore[override]  # an attribute there
        """Share of the head that is read; see `Engine.head_share`."""
        return self.inner.head_share

    @property
    def threads(self) -> int | None:
        """Number of threads; see `Engine.threads`."""
        return self.inner.threads

    @threads.setter
    def threads(self, count: int | None) -> None:
        self.inner.threads = count

    @property
    def device(self) -> str | None:  # type: ignore[override]  # an attribute there
        """Device; see `Engine.device`."""
        return self.inner.device

    @property
    def memory(self) -> Memory:
        """Pages of keys and values; see `Engine.memory`."""
        return self.inner.memory

    def _limit_pages(self, pages: int | None) -> None:
        self.inner._limit_pages(pages)  # the other half of `kv_limit`

    def pages(self, sequence: Cached) -> Sequence[int]:
        """Return what tells the pages of a sequence apart; see `Engine.pages`."""
        return self.inner.pages(sequence)

    def open(self) -> Cached:
        """Open an empty sequence; see `Engine.open`."""
        return self.inner.open()

    def forward(
        self,
        batch: Sequence[tuple[Cached, TokenTree]],
        rows: Rows = "all",
        view: View | None = None,
    ) -> Floats:
        """Run trees; see `Engine.forward`."""
        return self.inner.forward(batch, rows, view)

    def prompt_pages(self, positions: int) -> int:
        """See `Engine`."""
        return self.inner.prompt_pages(positions)

    def rows(self, sequence: Cached, layer: int) -> Tokens:
        """Return the positions of the rows held; see `Engine.rows`."""
        return self.inner.rows(sequence, layer)

    def row_count(self, sequence: Cached) -> int:
        """Return how many rows are held; see `Engine.row_count`."""
        return self.inner.row_count(sequence)

    def track_attention(self, sequence: Cached) -> None:
        """Sum the attention that rows receive; see `Engine.track_attention`."""
        self.inner.track_attention(sequence)

    def attention_mass(self, sequence: Cached, layer: int) -> NDArray[np.float64]:
        """Return the attention that rows received; see `Engine.attention_mass`."""
        return self.inner.attention_mass(sequence, layer)

    def keys_values(self, sequence: Cached, layer: int) -> tuple[Floats, Floats]:
        """Return cached keys and values; see `Engine.keys_values`."""
        return self.inner.keys_values(sequence, layer)

    def track_queries(self, sequence: Cached, window: int) -> None:
        """Keep the last queries; see `Engine.track_queries`."""
        self.inner.track_queries(sequence, window)

    def recent_queries(self, sequence: Cached, layer: int) -> Floats:
        """Return the last queries; see `Engine.recent_queries`."""
        return self.inner.recent_queries(sequence, layer)

    def query_pages(self, positions: int) -> int:
        """Return the pages that tracked queries take; see `Engine.query_pages`."""
        return self.inner.query_pages(positions)

    def track_surprisal(self, sequence: Cached) -> None:
        """Keep the surprisal of tokens; see `Engine.track_surprisal`."""
        self.inner.track_surprisal(sequence)

    def surprisal(self, sequence: Cached) -> NDArray[np.float64]:
        """Return the surprisal of tokens; see `Engine.surprisal`."""
        return self.inner.surprisal(sequence)

    def evict(self, sequence: Cached, kept: Sequence[ArrayLike]) -> None:
        """Drop rows; see `Engine.evict`."""
        self.inner.evict(sequence, kept)

    def read_page(self, sequence: Cached, page: int) -> NDArray[np.uint8]:
        """Return a page of a sequence; see `Engine.read_page`."""
        return self.inner.read_page(sequence, page)

    def append_page(self, sequence: Cached, page: NDArray[np.uint8]) -> None:
        """Commit a page; see `Engine.append_page`."""
        self.inner.append_page(sequence, page)

    def append_rows(self, sequence: Cached, rows: Sequence[tuple[Floats, Floats]]) -> None:
        """Commit positions by keys and values; see `Engine.append_rows`."""
        self.inner.append_rows(sequence, rows)

    def hidden(self) -> Floats:
        """Return hidden states of the last pass; see `Engine.hidden`."""
        return self.inner.hidden()

    def forward_mixed(self, sequence: Cached, tokens: Tokens, weights: Floats) -> Floats:
        """Run a chain of mixed nodes; see `Engine.forward_mixed`."""
        return self.inner.forward_mixed(sequence, tokens, weights)

    def forward_part(
        self,
        batch: Sequence[tuple[Cached, TokenTree]],
        states: Floats | None,
        rows: Rows = "all",
    ) -> Floats:
        """Run a part of the layers; see `Engine.forward_part`."""
        return self.inner.forward_part(batch, states, rows)

    def check_whole(self) -> None:
        """Refuse a part of a model; see `Engine.check_whole`."""
        self.inner.check_whole()

    def commit(self, sequence: Cached, path: ArrayLike) -> None:
        """Keep the rows of a path; see `Engine.commit`."""
        self.inner.commit(sequence, path)

    def set_prompt(self, sequence: Cached, length: int) -> None:
        """Say what is a prompt; see `Engine.set_prompt`."""
        self.inner.set_prompt(sequence, length)

    def prompt_positions(self, sequence: Cached) -> int:
        """Return how much a prompt would have given alike; see `Engine.prompt_positions`."""
        return self.inner.prompt_positions(sequence)

    def prompt_chunk(self, sequence: Cached, size: int) -> int:
        """Return how many tokens a pass takes; see `Engine.prompt_chunk`."""
        return self.inner.prompt_chunk(sequence, size)

    def truncate(self, sequence: Cached, length: int) -> None:
        """Drop positions; see `Engine.truncate`."""
        self.inner.truncate(sequence, length)

    def cut_point(self, sequence: Cached, length: int) -> int:
        """Return where a sequence can be cut; see `Engine.cut_point`."""
        return self.inner.cut_point(sequence, length)

    def fork(self, sequence: Cached) -> Cached:
        """Fork a sequence; see `Engine.fork`."""
        return self.inner.fork(sequence)

    def release(self, sequence: Cached) -> None:
        """Release a sequence; see `Engine.release`."""
        self.inner.release(sequence)

    def check(self, sequence: Cached, tree: TokenTree, view: View | None = None) -> None:
        """Refuse what cannot be run; see `Engine.check`."""
        self.inner.check(sequence, tree, view)

    def check_mixed(self, sequence: Cached, tokens: Tokens, weights: Floats) -> None:
        """Refuse mixtures that cannot be run; see `Engine.check_mixed`."""
        self.inner.check_mixed(sequence, tokens, weights)
