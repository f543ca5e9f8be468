"""The native engine: C++ kernels on the CPU, one call for a pass, the same bits for any batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paceline import _native
from paceline.abilities import Ability
from paceline.compatibility import Side, check
from paceline.core import Floats, Tokens, TokenTree
from paceline.engines.base import WITHOUT_PATTERNS, Cached, Engine, Rows, wanted
from paceline.engines.byte_activations import choose_activations
from paceline.engines.cache_blocks import unpack_blocks
from paceline.engines.checks import check_kept, check_rows
from paceline.engines.collaborators import AttentionPattern
from paceline.engines.few_read import RUN
from paceline.engines.formats import (
    ACTIVATIONS,
    FORMATS,
    Format,
    NotTernaryError,
    parse_format,
    split_activations,
    with_activations,
)
from paceline.engines.head_screen import HeadScreen
from paceline.engines.kv_formats import GROUPED_KV, NO_GROUPED_KV
from paceline.engines.low_rank_terms import whole
from paceline.engines.native_weights import load_weights
from paceline.engines.pages import Memory
from paceline.engines.part import Part
from paceline.engines.screened import Logits
from paceline.engines.sides import model_sides
from paceline.engines.sparse_prefill import BLOCK, SparsePrefill, block_chunk, block_cut
from paceline.engines.surprisals import Surprisals
from paceline.engines.threads import default_threads
from paceline.engines.view import View
from paceline.engines.weight_stream import stream_weights
from paceline.errors import MemoryFullError, MethodError, ModelError, RequestError
from paceline.models.config import ModelConfig
from paceline.models.tensors import Linear

__all__ = ["FORMATS", "KV_FORMATS", "NativeEngine", "default_threads"]

KV_FORMATS = ("fp32", "fp16", "int8", *GROUPED_KV)
_OPEN_PAGES = 4  # rows of one group of 32 that is not rounded yet, and of the next
_ROPE_BLOCK = 512  # positions by which the rotary tables grow


class Spent(NamedTuple):
    """Time and work of one part of the passes.

    Attributes:
        seconds: from the beginning of its phases to that of the next ones.
        busy: seconds that all threads together worked in them.
        bytes: of weights, or of cached keys and values, that were read.
        macs: multiply-adds.
    """

    seconds: float
    busy: float
    bytes: float
    macs: float


class NativeEngine(Engine):
    """Runs a model in the native kernels.

    Args:
        config: the model's shape.
        weights: canonical name -> float32 array or stored matrix. Those of a checkpoint are read
            as it holds them, a few rows at a time, so that memory peaks little above the final
            size.
        threads: how many threads share a pass; None reads PACELINE_THREADS, or takes one for each
            physical core. The logits do not depend on it.
        format: how matrices are stored, one of `FORMATS`, with `:head=` and another where
            embedding and head have their own, see `formats`; or `auto`, which keeps every matrix
            as it is stored. With `act=int8` products with GGUF blocks and groups of integers
            round activations to 8 bits, with `act=auto` where this model loses little, see
            `byte_activations`; otherwise to 16.
        kv_format: how keys and values are cached, one of `KV_FORMATS`. int4 and int3 round 32
            positions together once they are committed, keys for each channel and values for each
            position over 32 channels; a position sees the others of its own 32 in fp16.
        kv_limit: most bytes that cached keys and values may take, see `Engine.kv_limit`.
        pattern: attention pattern, one that chooses runs of positions; None: all are read.
        weights_memory: most bytes of weights in memory; None: all. Layers beyond it are written
            to a file in the cache folder, and each pass reads them from there while it computes
            others: see `weight_bytes` and `streamed_bytes`. The logits do not depend on it.
        part: layers that are run, by `forward_part`; None: all. `config` and `weights` are those
            of the whole model.
        isa: instruction set, one of `_native.isas()`; empty reads PACELINE_ISA, or takes the
            fastest. Logits of two instruction sets differ by rounding.

    Raises:
        ModelError: a weight is missing, unknown, of the wrong shape or not finite;
            `NotTernaryError` where it is not ternary and shall be stored so; the file for layers
            cannot be written, or `weights_memory` is too small.
        MethodError: unknown formats, instruction set or number of threads; `act=int8` where no
            weights can be multiplied so.

    Attributes:
        activations: what products with GGUF blocks and groups of integers round activations to,
            `int8` or `int16`.
    """

    name = "native"
    invariant = True
    tolerance = 1e-4
    abilities = frozenset(
        {
            Ability.LAYERS,
            Ability.POSITIONS,
            Ability.TOKENS,
            Ability.MIXTURES,
            Ability.HIDDEN,
            Ability.EVICT,
            Ability.ATTENTION_MASS,
            Ability.KEYS,
            Ability.QUERIES,
            Ability.SURPRISAL,
            Ability.STORED_PAGES,
            Ability.APPEND_ROWS,
        }
    )

    _sparse_prefill: SparsePrefill | None = None

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Linear | Floats],
        threads: int | None = None,
        format: str = "fp32",  # noqa: A002 (its name everywhere)
        isa: str = "",
        kv_format: str = "fp32",
        kv_limit: int | None = None,
        pattern: AttentionPattern | None = None,
        weights_memory: int | None = None,
        part: Part | None = None,
    ) -> None:
        self.part = part
        if part is not None:
            config, weights = part.config(config), part.weights(config, weights)
        self.config = config
        check({Side.NATIVE: "the native engine", **model_sides(config)})
        weight_format, act = split_activations(format)
        chosen = None if weight_format == "auto" else parse_format(weight_format)
        first = chosen or Format("fp32", "fp32")
        self.kv_format = kv_format
        if kv_format in GROUPED_KV:
            self.abilities = self.abilities - NO_GROUPED_KV
            self.open_pages = _OPEN_PAGES
        count = default_threads() if threads is None else threads
        try:
            self._model = _native.NativeModel(
                config,
                first.layers,
                first.head,
                kv_format,
                isa,
                count,
                None if pattern is None else pattern.few_read,
                part is None or part.begins,
                part is None or part.ends,
            )
        except ValueError as error:
            raise MethodError(str(error)) from None
        if kv_limit is not None:
            self.kv_limit = kv_limit
        self._ropes = self._model.ropes
        self._rope_end = 0
        self._surprisals = WeakKeyDictionary[_native.NativeSequence, Surprisals]()
        self._hidden_rows: NDArray[np.bool_] | None = None  # None: all of the last pass
        if weights_memory is not None:
            stream_weights(self._model, weights_memory)
        try:
            in_bytes, share = act != ACTIVATIONS[0], weights_memory is None
            formats = load_weights(self._model, weights, chosen, in_bytes, share)
            self._model.finish()
        except _native.NotTernaryError as error:
            raise NotTernaryError(str(error)) from None
        except (ValueError, _native.WeightFileError) as error:
            raise ModelError(str(error)) from None
        self.streamed_bytes = self._model.streamed[1]
        self.weights_memory = weights_memory if self.streamed_bytes else None
        if part is not None and act == ACTIVATIONS[2]:
            raise MethodError(
                "act=auto measures a whole model, and this engine holds a part of one; take "
                "act=int8, or leave it out"
            )
        self.activations = choose_activations(self, self._model, act)
        self.format = with_activations(str(chosen or formats), self.activations)
        # A copy of the head saves next to nothing beside the disk, and is no part of the budget.
        unscreened = self.streamed_bytes or part is not None
        self.head_screen = HeadScreen(self._model, "off" if unscreened else "")
        if pattern is not None:
            self._set_pattern(pattern)

    def _set_pattern(self, pattern: AttentionPattern) -> None:
        if pattern.few_read is not None:
            reads = pattern.head_reads(self)
            self._model.set_head_reads([[int(read) for read in layer] for layer in reads])
        self._sparse_prefill = pattern.sparse_prefill
        if (rule := self._sparse_prefill) is not None:
            heads = [] if rule.by_mass else rule.of_layers(self.config)
            self._model.set_sparse_prefill(
                rule.samples,
                rule.threshold,
                rule.sinks,
                rule.local,
                rule.dense,
                [[(int(head.rule), head.first, head.second) for head in layer] for layer in heads],
            )
        self.pattern, self.abilities = pattern, self.abilities - WITHOUT_PATTERNS

    def dense(self, name: str) -> Floats:
        """Return the matrix `name` as the engine holds it, float32 [out, in].

        Raises:
            ModelError: the engine holds no such matrix.
        """
        try:
            base = self._model.get(name)
            if not self._model.has_low_rank(name):
                return base
            return whole(base, self._model.get(f"{name}.right"), self._model.get(f"{name}.left"))
        except (ValueError, _native.WeightFileError) as error:
            raise ModelError(str(error)) from None

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._model.isa

    @property
    def weight_bytes(self) -> int:  # type: ignore[override]  # an attribute there
        """Size of the matrices, which every pass reads."""
        return self._model.bytes

    @property
    def shared_bytes(self) -> int:  # type: ignore[override]  # an attribute there
        """Size of the matrices that are another layer's, and take no memory of their own."""
        return self._model.shared_bytes

    @property
    def screens_drafts(self) -> bool:  # type: ignore[override]  # an attribute there
        """Whether passes with drafts read the head in part, too; see `HeadScreen`."""
        return self.head_screen.mode == "on"

    @property
    def head_share(self) -> float:  # type: ignore[override]  # an attribute there
        """Bytes that recent passes read for the head, over its size; 1 where it is read whole."""
        share = self.head_screen.share
        return share if share is not None and self.head_screen.state == "on" else 1.0

    @property
    def position_bytes(self) -> float:
        """Bytes that keys and values of one position take."""
        return self._model.position_bytes

    @property
    def memory(self) -> Memory:
        """The pages of keys and values now."""
        return Memory(self._model.page_bytes, *self._model.pages)

    def _limit_pages(self, pages: int | None) -> None:
        try:
            self._model.set_page_limit(pages)
        except ValueError as error:
            raise MethodError(f"{error}; release sequences first") from None

    def pages(self, sequence: Cached) -> Sequence[int]:
        """Return an identifier of each page; see `Engine.pages`."""
        return _own(sequence).pages

    @property
    def parameters(self) -> int:
        """Number of weights that one pass multiplies with, padding included."""
        return self._model.parameters

    @property
    def threads(self) -> int:
        """Number of threads that share a pass. Can be set between passes."""
        return self._model.threads

    @threads.setter
    def threads(self, count: int) -> None:
        try:
            self._model.threads = count
        except ValueError as error:
            raise MethodError(str(error)) from None

    @property
    def profiling(self) -> bool:
        """Whether passes are timed part by part; switching it on clears the times so far."""
        return self._model.profiling

    @profiling.setter
    def profiling(self, on: bool) -> None:
        self._model.profiling = on

    def profile(self) -> dict[str, Spent]:
        """Return the time and work of each part, over all passes that were timed."""
        return {name: Spent(*spent) for name, spent in self._model.profile().items()}

    def open(self) -> Cached:
        """Open a new, empty sequence."""
        return self._model.open()

    def forward(
        self,
        batch: Sequence[tuple[Cached, TokenTree]],
        rows: Rows = "all",
        view: View | None = None,
    ) -> Floats:
        """Run every tree in one native call; see `Engine.forward`."""
        self.check_whole()
        if self._surprisals and any(sequence in self._surprisals for sequence, _ in batch):
            return self._forward_tracked(batch, wanted(rows, batch), view)
        self._hidden_rows = None
        return self._forward(batch, rows, view)

    def forward_part(
        self,
        batch: Sequence[tuple[Cached, TokenTree]],
        states: Floats | None,
        rows: Rows = "all",
    ) -> Floats:
        """Run this part's layers in one native call; see `Engine.forward_part`."""
        part = self.part
        if part is None:
            return super().forward_part(batch, states, rows)
        nodes = sum(len(tree) for _, tree in batch)
        part.check_states(nodes, self.config.hidden_size, states)
        self._hidden_rows = None
        return self._forward(batch, rows if part.ends else "all", None, states)

    def _forward(
        self,
        batch: Sequence[tuple[Cached, TokenTree]],
        rows: Rows,
        view: View | None,
        states: Floats | None = None,
    ) -> Floats:
        entries = [(sequence, tree.tokens, tree.parents) for sequence, tree in batch]
        self._extend_ropes_for(batch)
        parts = (view.layers, view.positions, view.tokens, view.exits) if view else (None,) * 4
        given = None if states is None else np.ascontiguousarray(states)
        try:
            return self._model.forward(entries, wanted(rows, batch), *parts, given)
        except _native.MemoryFullError as error:
            self._make_room(batch, error)
            return self._forward(batch, rows, view, states)
        except (ValueError, TypeError, RuntimeError) as error:
            raise self._refusal(batch, view, error) from None

    def _forward_tracked(
        self, batch: Sequence[tuple[Cached, TokenTree]], rows: list[bool], view: View | None
    ) -> Floats:
        """Run trees of which some belong to sequences that track surprisal: with all logits."""
        own = [self._surprisals.get(_own(sequence)) for sequence, _ in batch]
        computed = [want or each is not None for want, each in zip(rows, own, strict=True)]
        if view is not None:
            logits = self._forward(batch, rows, view)
            self._hidden_rows = None
        else:
            logits = self._forward(batch, computed, None)
            sizes = [len(tree) * run for (_, tree), run in zip(batch, computed, strict=True)]
            parts = np.split(logits, np.cumsum(sizes)[:-1])
        for index, ((_, tree), tracked) in enumerate(zip(batch, own, strict=True)):
            if tracked is not None:
                tracked.note(tree, None if view is not None else parts[index])
        if view is not None or rows == computed:
            return logits
        self._hidden_rows = np.repeat(rows, sizes)
        return np.ascontiguousarray(logits[self._hidden_rows])

    def forward_screened(
        self, batch: Sequence[tuple[Cached, TokenTree]], rows: Rows = "all"
    ) -> Logits:
        """Run every tree with the coarse head where that pays; see `Engine.forward_screened`."""
        self.check_whole()
        own = wanted(rows, batch)
        tracked = any(sequence in self._surprisals for sequence, _ in batch)
        if tracked or not any(own) or not self.head_screen.ready():
            return self.forward(batch, own)
        self._hidden_rows = None
        self._extend_ropes_for(batch)
        entries = [(sequence, tree.tokens, tree.parents) for sequence, tree in batch]
        try:
            return self.head_screen.run(entries, own)
        except _native.MemoryFullError as error:
            self._make_room(batch, error)
            return self.forward_screened(batch, own)
        except (ValueError, TypeError, RuntimeError) as error:
            raise self._refusal(batch, None, error) from None

    def hidden(self) -> Floats:
        """Hidden states of the last pass; see `Engine.hidden`."""
        try:
            states = self._model.hidden()
        except ValueError as error:
            raise RequestError(str(error)) from None
        if self._hidden_rows is None:
            return states
        if not self._hidden_rows.any():
            raise RequestError("the last pass made no logits, so that it has no hidden states")
        return np.ascontiguousarray(states[self._hidden_rows])

    def forward_mixed(self, sequence: Cached, tokens: Tokens, weights: Floats) -> Floats:
        """Run a chain of mixed nodes; see `Engine.forward_mixed`."""
        self.check_whole()
        own = _own(sequence)
        self._check_untracked(own)
        self._hidden_rows = None
        self.check_mixed(own, tokens, weights)
        self._extend_ropes(min(own.length + len(tokens), self.config.context))
        try:
            return self._model.forward_mixed(
                own, np.ascontiguousarray(tokens), np.ascontiguousarray(weights)
            )
        except _native.WeightFileError as error:
            raise ModelError(str(error)) from None
        except _native.MemoryFullError as error:
            if self._lent(self._pages([(own.row_count, len(tokens))])):
                return self.forward_mixed(sequence, tokens, weights)
            raise self._full(error) from None
        except ValueError as error:
            raise RequestError(f"this pass cannot be run: {error}") from None

    def commit(self, sequence: Cached, path: ArrayLike) -> None:
        """Keep the rows of `path`; see `Engine.commit`."""
        nodes = np.asarray(path, np.int32)
        try:
            _own(sequence).commit(nodes)
        except (ValueError, TypeError) as error:
            raise RequestError(f"cannot commit {nodes}: {error}") from None
        if self._surprisals and (tracked := self._surprisals.get(_own(sequence))) is not None:
            tracked.commit(nodes)

    def truncate(self, sequence: Cached, length: int) -> None:
        """Forget all positions from `length` on."""
        if self._surprisals and (tracked := self._surprisals.get(_own(sequence))) is not None:
            tracked.truncate(length)
        try:
            _own(sequence).truncate(length)
        except (ValueError, TypeError) as error:
            raise RequestError(f"cannot truncate to {length}: {error}") from None

    def cut_point(self, sequence: Cached, length: int) -> int:
        """Return where a sequence can be cut; see `Engine.cut_point`."""
        own = _own(sequence)
        if self._sparse_prefill is not None:
            return block_cut(length, own.prompt)
        return own.cut_point(length)

    def fork(self, sequence: Cached) -> Cached:
        """Return a sequence with the same committed positions; pages are shared until written."""
        own = _own(sequence)
        try:
            other = own.fork()
        except _native.MemoryFullError as error:
            if self._lent(self.query_pages(own.length)):
                return self.fork(sequence)
            raise self._full(error) from None
        except ValueError as error:
            raise RequestError(str(error)) from None
        if own in self._surprisals:
            self._surprisals[other] = self._surprisals[own].fork()
        return other

    def set_prompt(self, sequence: Cached, length: int) -> None:
        """Say what is a prompt; see `Engine.set_prompt`."""
        _own(sequence).prompt = length

    def prompt_positions(self, sequence: Cached) -> int:
        """Return how much a prompt would have given alike; see `Engine.prompt_positions`."""
        own = _own(sequence)
        if self._sparse_prefill is not None:
            return min(own.length, own.prompt) // BLOCK * BLOCK
        return own.length if self.pattern is None else min(own.length, own.prompt)

    def prompt_chunk(self, sequence: Cached, size: int) -> int:
        """Return how many tokens a pass takes; see `Engine.prompt_chunk`."""
        own = _own(sequence)
        if self._sparse_prefill is None:
            return size
        return block_chunk(own.length, own.prompt, size)

    def rows(self, sequence: Cached, layer: int) -> Tokens:
        """Return the positions of the rows held; see `Engine.rows`."""
        return _own(sequence).rows(layer)

    def row_count(self, sequence: Cached) -> int:
        """Return how many rows the head with most holds."""
        return _own(sequence).row_count

    def track_attention(self, sequence: Cached) -> None:
        """Sum the attention that rows receive; see `Engine.track_attention`."""
        try:
            _own(sequence).track_attention()
        except ValueError as error:
            raise RequestError(str(error)) from None

    def attention_mass(self, sequence: Cached, layer: int) -> NDArray[np.float64]:
        """Return the attention that rows received; see `Engine.attention_mass`."""
        try:
            return _own(sequence).attention_mass(layer)
        except ValueError as error:
            raise RequestError(str(error)) from None

    def keys_values(self, sequence: Cached, layer: int) -> tuple[Floats, Floats]:
        """Return cached keys and values; see `Engine.keys_values`."""
        shape, own = self.config.layers[layer], _own(sequence)
        if not shape.heads:
            none = np.empty((0, own.rows(layer).shape[1], shape.head_dim), np.float32)
            return none, none
        if self.kv_format in GROUPED_KV:
            keys, values = own.read_rows(layer).reshape(2, shape.kv_heads, -1, shape.head_dim)
            return keys, values
        missing = (own.rows(layer) < 0).sum(1)
        rows = own.rows(layer).shape[1]
        blocks = own.read_blocks(layer)
        both = unpack_blocks(blocks, shape.kv_heads, rows, shape.head_dim, self.kv_format)
        for head in np.flatnonzero(missing):  # as `rows`: padding comes first
            for each in both:
                each[head] = np.roll(each[head], missing[head], axis=0)
                each[head, : missing[head]] = 0
        return both

    def track_queries(self, sequence: Cached, window: int) -> None:
        """Keep the last queries; see `Engine.track_queries`."""
        try:
            _own(sequence).track_queries(window)
        except ValueError as error:
            raise RequestError(str(error)) from None

    def recent_queries(self, sequence: Cached, layer: int) -> Floats:
        """Return the last queries; see `Engine.recent_queries`."""
        try:
            queries = _own(sequence).recent_queries(layer)
        except ValueError as error:
            raise RequestError(str(error)) from None
        shape = self.config.layers[layer]
        heads = queries.reshape(len(queries), shape.heads, shape.head_dim)
        return np.ascontiguousarray(heads.transpose(1, 0, 2))

    def query_pages(self, positions: int) -> int:
        """Return the pages that tracked queries take; see `Engine.query_pages`."""
        if not positions:
            return 0
        size = 4 * max(layer.heads * layer.head_dim for layer in self.config.layers)
        count = positions * len(self.config.layers)
        return -(-count // max(1, self.memory.page_bytes // size))

    def prompt_pages(self, positions: int) -> int:
        """Return the pages of a prompt's clusters; see `Engine.prompt_pages`."""
        rule = self.pattern.few_read if self.pattern is not None else None
        return Memory.pages(positions // RUN * RUN) if rule is not None and rule.clusters else 0

    def track_surprisal(self, sequence: Cached) -> None:
        """Keep the surprisal of tokens; see `Engine.track_surprisal`."""
        own = _own(sequence)
        if own.length:
            raise RequestError("surprisal can only be kept from the first position on")
        self._surprisals[own] = Surprisals()

    def surprisal(self, sequence: Cached) -> NDArray[np.float64]:
        """Return the surprisal of tokens; see `Engine.surprisal`."""
        tracked = self._surprisals.get(_own(sequence))
        if tracked is None:
            raise RequestError("this sequence does not track surprisal; `track_surprisal` does")
        return tracked.values

    def evict(self, sequence: Cached, kept: Sequence[ArrayLike]) -> None:
        """Drop all rows but `kept`; see `Engine.evict`."""
        if self.pattern is not None:
            raise RequestError(
                f"rows cannot be evicted beside the attention pattern {self.pattern.name}"
            )
        own = _own(sequence)
        rows = check_kept(self, own, kept)
        try:
            own.evict(rows)
        except _native.MemoryFullError as error:
            if self._lent(Memory.pages(own.row_count)):
                return self.evict(sequence, kept)
            raise self._full(error) from None

    def read_page(self, sequence: Cached, page: int) -> NDArray[np.uint8]:
        """Return a copy of a full page; see `Engine.read_page`."""
        self._check_untracked(_own(sequence))
        try:
            return _own(sequence).read_page(page)
        except (ValueError, TypeError) as error:
            raise RequestError(f"cannot read page {page}: {error}") from None

    def append_page(self, sequence: Cached, page: NDArray[np.uint8]) -> None:
        """Commit a page of keys and values; see `Engine.append_page`."""
        own = _own(sequence)
        self._check_untracked(own)
        try:
            own.append_page(page)
        except _native.MemoryFullError as error:
            if self._lent(1):
                return self.append_page(sequence, page)
            raise self._full(error) from None
        except (ValueError, TypeError) as error:
            raise RequestError(f"cannot append a page: {error}") from None

    def append_rows(self, sequence: Cached, rows: Sequence[tuple[Floats, Floats]]) -> None:
        """Commit positions by keys and values; see `Engine.append_rows`."""
        own = _own(sequence)
        if Ability.APPEND_ROWS not in self.abilities:
            raise RequestError("cannot append rows: this cache does not take single rows")
        count = check_rows(self, own, rows)
        try:
            own.append_rows([keys for keys, _ in rows], [values for _, values in rows])
        except _native.MemoryFullError as error:
            if self._lent(self._pages([(own.row_count, count)])):
                return self.append_rows(sequence, rows)
            raise self._full(error) from None
        except (ValueError, TypeError) as error:
            raise RequestError(f"cannot append rows: {error}") from None

    def release(self, sequence: Cached) -> None:
        """Give the memory back."""
        _own(sequence).release()
        self._surprisals.pop(_own(sequence), None)

    def _check_untracked(self, sequence: _native.NativeSequence) -> None:
        if sequence in self._surprisals:
            raise RequestError("this sequence tracks surprisal, which only plain passes give")

    def _extend_ropes_for(self, batch: Sequence[tuple[Cached, TokenTree]]) -> None:
        end = max((len(tree) + sequence.length for sequence, tree in batch), default=0)
        if end > self._rope_end:
            self._extend_ropes(min(end, self.config.context))

    def _extend_ropes(self, end: int) -> None:
        """Extend the rotary tables to `end` positions or more."""
        if end <= self._rope_end:
            return
        start = self._rope_end
        stop = min(-(-end // _ROPE_BLOCK) * _ROPE_BLOCK, self.config.context)
        for index, rope in enumerate(self._ropes):
            cosines, sines = rope.table(start, stop)
            self._model.extend_rope(
                index, np.ascontiguousarray(cosines), np.ascontiguousarray(sines)
            )
        self._rope_end = stop

    def _make_room(self, batch: Sequence[tuple[Cached, TokenTree]], error: Exception) -> None:
        """Borrow pages for a pass that lacks some, or refuse it."""
        rows = [(self.row_count(own), len(tree)) for own, tree in batch]
        queries = sum(self.query_pages(_own(own).query_window) for own, _ in batch)
        queries += sum(self.prompt_pages(_own(own).prompt) for own, _ in batch)
        if not self._lent(self._pages(rows) + queries):
            raise self._full(error) from None

    def _pages(self, rows: Sequence[tuple[int, int]]) -> int:
        """Return an upper bound of the new pages for passes of (rows held, nodes)."""
        further = 1 + self.open_pages
        return sum(Memory.pages(size + more) - Memory.pages(size) + further for size, more in rows)

    def _full(self, error: Exception) -> Exception:
        limit = self.memory.limit
        return MemoryFullError(f"{error} of {limit}; wait for other requests, or raise the limit")

    def _refusal(
        self, batch: Sequence[tuple[Cached, TokenTree]], view: View | None, error: Exception
    ) -> Exception:
        """Return the error to raise for a pass that the native code refused."""
        if isinstance(error, _native.WeightFileError):
            return ModelError(str(error))
        for sequence, tree in batch:
            self.check(_own(sequence), tree, view)
        return RequestError(f"this pass cannot be run: {error}")


def _own(sequence: Cached) -> _native.NativeSequence:
    if not isinstance(sequence, _native.NativeSequence):
        raise RequestError("this sequence belongs to another engine")
    return sequence
