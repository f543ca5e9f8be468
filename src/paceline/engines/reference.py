"""The reference engine in torch: any family, any device, slow; other engines are tested by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional as F

from paceline.abilities import Ability
from paceline.cache_dir import cache_folder
from paceline.compatibility import Side, check
from paceline.core import Floats, Tokens, TokenTree
from paceline.engines.base import WITHOUT_PATTERNS, Cached, Engine, Rows, wanted
from paceline.engines.checks import check_kept, check_rows
from paceline.engines.collaborators import AttentionPattern
from paceline.engines.grouped_cache import GroupedView, rounded_rows
from paceline.engines.grouped_rounding import to_half
from paceline.engines.kv_formats import NO_GROUPED_KV, grouped_format
from paceline.engines.latents import latent_factors
from paceline.engines.neuron_window import NeuronFile, NeuronWindow, neuron_bytes, share_memory
from paceline.engines.pages import PAGE, Memory
from paceline.engines.part import Part
from paceline.engines.pattern_mask import PatternMask
from paceline.engines.reference_cache import ReferenceCache, visible
from paceline.engines.sparse_prefill import (
    BLOCK,
    SparsePrefill,
    block_chunk,
    block_cut,
    check_blocks,
)
from paceline.engines.stored_layers import StoredLayers, multiplied, shared_matrix
from paceline.engines.surprisals import Surprisals
from paceline.engines.torch_device import open_device
from paceline.engines.view import View
from paceline.errors import MemoryFullError, MethodError, RequestError
from paceline.models import blocks
from paceline.models.config import ModelConfig
from paceline.models.dual_chunk import score_change
from paceline.models.rope import DUAL_CHUNK, Rope
from paceline.models.tensors import Linear, to_dense

STORED = "stored"  # the format of matrices that are expanded while their layer runs
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_Layer = dict[str, blocks.Matrix]


class ReferenceEngine(Engine):
    """Runs a model in torch, sequence by sequence.

    Args:
        config: the model's shape.
        weights: canonical name -> float32 array or stored matrix; read layer by layer.
        device: any torch device.
        dtype: of weights and activations; norms and softmax are computed in float32.
        pattern: which cached positions are read; None: all that the model shows.
        kv_limit: most bytes that cached keys and values may take, see `Engine.kv_limit`.
        stored: keep the matrices of the layers as they are stored, see `StoredLayers`.
        kv_format: int4, int3 or gear rounds keys and values as `grouped_cache` says (the memory
            that they take stays that of `dtype`); auto keeps them in `dtype`.
        part: layers that are run, by `forward_part`; None: all. `config` and `weights` are those
            of the whole model.
        weights_memory: most bytes of weights in memory, of models with ReLU;
            None: all. Neurons beyond it are read from a file, see `NeuronWindow`.

    Raises:
        MethodError: torch has no such device here.
        ModelError: a tensor holds NaN or infinite values; `weights_memory` is too small, or there
            is no room for the file.
    """

    name = "reference"
    invariant = False
    tolerance = 1e-3
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
            Ability.APPEND_ROWS,
        }
    )

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Linear | Floats],
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        kv_limit: int | None = None,
        pattern: AttentionPattern | None = None,
        stored: bool = False,
        kv_format: str = "auto",
        part: Part | None = None,
        weights_memory: int | None = None,
    ) -> None:
        self.part = part
        if part is not None:
            config, weights = part.config(config), part.weights(config, weights)
        self.config = config
        self.pattern = pattern
        self._sparse_prefill: SparsePrefill | None = None
        if pattern is not None:
            self._sparse_prefill = pattern.sparse_prefill
            if self._sparse_prefill is not None:
                self._sparse_prefill.of_layers(config)
            self.abilities = self.abilities - WITHOUT_PATTERNS
        self._device = open_device(device)
        self.device = str(self._device)
        self.dtype = dtype
        self.kv_format = next(name for name, known in DTYPES.items() if known == dtype)
        self.format = STORED if stored else self.kv_format
        self._grouped = grouped_format(kv_format)
        if self._grouped is not None:
            self.kv_format = kv_format
            self.abilities = self.abilities - NO_GROUPED_KV
        self._live: WeakSet[ReferenceCache] = WeakSet()
        self._numbers = count()
        self._limit: int | None = None
        self._outer: dict[str, Tensor] = {}
        self.windows: list[NeuronWindow] = []
        self._hidden: list[Tensor] = []  # of the last forward, [N, hidden] for each tree
        layers: list[_Layer] = [{} for _ in config.layers]
        for name in weights:
            if stored and name.startswith("layers."):
                continue
            if weights_memory is not None and name.endswith((".up", ".down")):
                continue
            _, index, rest = name.split(".", 2) if name.startswith("layers.") else ("", "", "")
            shared = shared_matrix(weights, name, layers, self._device, dtype)
            if shared is not None:
                layers[int(index)][rest] = shared
                continue
            tensor = torch.tensor(to_dense(weights[name])).to(self._device, dtype)
            if index:
                layers[int(index)][rest] = multiplied(weights[name], tensor)
            else:
                self._outer[name] = tensor
        self._layers: list[_Layer] | StoredLayers = layers
        # What a layer caches of a position: keys and values of each head, or one latent.
        self._cached = [(2, layer.kv_heads, layer.head_dim) for layer in config.layers]
        if stored:
            self._layers = StoredLayers(weights, len(config.layers), self._device, dtype)
        else:
            self._take_latents(weights)
        if weights_memory is not None:
            self._take_neurons(weights, weights_memory, layers)
        self._mask = None if pattern is None else PatternMask(config, pattern, None)
        if pattern is not None and pattern.few_read is not None:
            self._mask = PatternMask(config, pattern, pattern.head_reads(self))
        if kv_limit is not None:
            self.kv_limit = kv_limit

    def _take_latents(self, weights: Mapping[str, Linear | Floats]) -> None:
        """Let layers whose keys and values are made of a latent cache that."""
        for index, layer in enumerate(self.config.layers):
            factors = latent_factors(weights, index, layer)
            if factors is None:
                continue
            if self._grouped is not None:
                latents, grouped = f"layer {index}", f"kv_format={self.kv_format}"
                check({Side.LATENTS: f"the latents of {latents}", Side.GROUPED_KV: grouped})
            made = {
                name: torch.tensor(factor.dense()).to(self._device, self.dtype)
                for name, factor in factors.items()
            }
            self._layers[index].update(made)
            self._cached[index] = (1, 1, len(made["latent"]))
            self.abilities = self.abilities - {
                Ability.EVICT,
                Ability.ATTENTION_MASS,
                Ability.KEYS,
                Ability.APPEND_ROWS,
            }

    def _take_neurons(
        self, weights: Mapping[str, Linear | Floats], budget: int, layers: list[_Layer]
    ) -> None:
        """Keep neurons in windows where not all weights fit into a budget of bytes."""
        held = [*self._outer.values(), *(each for layer in layers for each in layer.values())]
        others = sum(each.nbytes for each in held if isinstance(each, Tensor))
        file = None
        if others + neuron_bytes(self.config, self.dtype.itemsize) > budget:
            file, self.weights_memory = NeuronFile(cache_folder()), budget
        for index, layer in enumerate(layers):
            if not self.config.layers[index].intermediate:
                continue
            up, down = (
                torch.tensor(to_dense(weights[f"layers.{index}.{name}"])).to(
                    self._device, self.dtype
                )
                for name in ("up", "down")
            )
            if file is None:
                layer.update(up=up, down=down)
                continue
            biases = [layer.get(f"{name}.bias") for name in ("up", "down")]
            up_bias, down_bias = (each if isinstance(each, Tensor) else None for each in biases)
            window = NeuronWindow(file, up, up_bias, down, down_bias, self.config.activation)
            layer["mlp"] = window
            self.windows.append(window)
        if self.windows:
            share_memory(self.windows, budget, others)
        self.streamed_bytes = sum(each.read_bytes for each in self.windows)

    @property
    def memory(self) -> Memory:
        """The pages of keys and values now. No page is shared."""
        row = sum(sides * heads * size for sides, heads, size in self._cached)
        row += 0 if self._mask is None else self._mask.query_floats
        used = sum(len(sequence.pages) + sequence.query_pages for sequence in self._live)
        return Memory(PAGE * row * self.dtype.itemsize, used, 0, used, self._limit)

    def _limit_pages(self, pages: int | None) -> None:
        used = self.memory.used
        if pages is not None and used > pages:
            raise MethodError(
                f"{used} pages are in memory, more than {pages}; release sequences first"
            )
        self._limit = pages

    def pages(self, sequence: Cached) -> Sequence[int]:
        """Return an identifier of each page; see `Engine.pages`."""
        return list(_own(sequence).pages)

    def open(self) -> Cached:
        """Open a new, empty sequence."""
        sequence = ReferenceCache(
            self._numbers,
            [
                torch.empty(sides, heads, 0, size, dtype=self.dtype, device=self._device)
                for sides, heads, size in self._cached
            ],
            memory=None if self._mask is None else self._mask.memory,
        )
        self._live.add(sequence)
        return sequence

    def forward(
        self,
        batch: Sequence[tuple[Cached, TokenTree]],
        rows: Rows = "all",
        view: View | None = None,
    ) -> Floats:
        """Run every tree, one after the other; see `Engine.forward`."""
        self.check_whole()
        for cached, tree in batch:
            self.check(cached, tree, view)
        rowed = wanted(rows, batch)
        self._make_room([(_own(cached), len(tree)) for cached, tree in batch])
        self._hidden = []
        tracked = [_own(cached).surprisals for cached, _ in batch]
        if any(each is not None for each in tracked):
            return self._forward_tracked(batch, rowed, view)
        view = view or View()
        columns = view.width(self.config.vocab_size)
        none = np.empty((view.heads, 0, columns), np.float32)
        runs = zip(batch, rowed, strict=True)
        logits = [self._run(_own(s), tree, want, view) for (s, tree), want in runs]
        return np.concatenate([none, *logits], 1).reshape(-1, columns)

    def forward_part(
        self,
        batch: Sequence[tuple[Cached, TokenTree]],
        states: Floats | None,
        rows: Rows = "all",
    ) -> Floats:
        """Run this part's layers, tree by tree; see `Engine.forward_part`."""
        part = self.part
        if part is None:
            return super().forward_part(batch, states, rows)
        for cached, tree in batch:
            self.check(cached, tree)
        sizes = [len(tree) for _, tree in batch]
        part.check_states(sum(sizes), self.config.hidden_size, states)
        rowed = wanted(rows if part.ends else "all", batch)
        self._make_room([(_own(cached), len(tree)) for cached, tree in batch])
        self._hidden = []
        width = self.config.vocab_size if part.ends else self.config.hidden_size
        made = [np.empty((1, 0, width), np.float32)]
        ends = np.cumsum(sizes)
        for (cached, tree), want, end in zip(batch, rowed, ends, strict=True):
            given = None if states is None else states[end - len(tree) : end]
            made.append(self._run(_own(cached), tree, want, View(), given=given))
        logits: Floats = np.concatenate(made, 1)[0]
        return logits

    def _forward_tracked(
        self, batch: Sequence[tuple[Cached, TokenTree]], rows: list[bool], view: View | None
    ) -> Floats:
        """Run trees of which some belong to sequences that track surprisal: with all logits."""
        plain, part = view is None, view or View()
        logits = [np.empty((part.heads, 0, part.width(self.config.vocab_size)), np.float32)]
        for (cached, tree), want in zip(batch, rows, strict=True):
            own = _own(cached)
            run = want or (plain and own.surprisals is not None)
            made = self._run(own, tree, run, part)
            if own.surprisals is not None:
                own.surprisals.note(tree, made[-1] if plain else None)
            if want:
                logits.append(made)
            elif run:
                self._hidden.pop()
        return np.concatenate(logits, 1).reshape(-1, logits[0].shape[2])

    def hidden(self) -> Floats:
        """Hidden states of the last pass; see `Engine.hidden`."""
        if not self._hidden:
            raise RequestError("the last pass made no logits, so that it has no hidden states")
        return np.asarray(torch.cat(self._hidden).float().cpu().numpy(), np.float32)

    def forward_mixed(self, sequence: Cached, tokens: Tokens, weights: Floats) -> Floats:
        """Run a chain of mixed nodes; see `Engine.forward_mixed`."""
        self.check_whole()
        own = _own(sequence)
        self.check_mixed(own, tokens, weights)
        if own.surprisals is not None:
            raise RequestError("this sequence tracks surprisal, which only plain passes give")
        self._make_room([(own, len(tokens))])
        self._hidden = []
        logits = self._run(own, TokenTree.chain(tokens[:, 0]), True, View(), (tokens, weights))
        return logits.reshape(-1, self.config.vocab_size)

    @torch.inference_mode()
    def commit(self, sequence: Cached, path: ArrayLike) -> None:
        """Move the rows of `path` to the end of the committed ones."""
        own = _own(sequence)
        nodes = np.asarray(path, np.int64)
        if own.viewed:
            raise RequestError(
                f"cannot commit {nodes}: the last forward pass was a view, to draft only"
            )
        if nodes.ndim != 1 or (nodes < 0).any() or (nodes >= own.pending).any():
            raise RequestError(f"path {nodes} leaves the {own.pending} nodes of the last forward")
        own.commit(self._tensor(nodes))

    def truncate(self, sequence: Cached, length: int) -> None:
        """Forget all positions from `length` on; see `Engine.truncate`."""
        _own(sequence).truncate(length)

    def cut_point(self, sequence: Cached, length: int) -> int:
        """Return where a sequence can be cut; see `Engine.cut_point`."""
        if self._sparse_prefill is None:
            return super().cut_point(sequence, length)
        return block_cut(length, _own(sequence).prompt)

    @torch.inference_mode()
    def fork(self, sequence: Cached) -> Cached:
        """Return an independent copy of the committed positions."""
        own = _own(sequence)
        self._afford(Memory.pages(own.row_count) + own.query_pages)
        self._live.add(other := own.fork())
        return other

    def set_prompt(self, sequence: Cached, length: int) -> None:
        """Say what is a prompt; see `Engine.set_prompt`."""
        _own(sequence).prompt = length

    def prompt_positions(self, sequence: Cached) -> int:
        """Return how much a prompt would have given alike; see `Engine.prompt_positions`."""
        own = _own(sequence)
        if self._sparse_prefill is not None:
            return min(own.length, own.prompt) // BLOCK * BLOCK
        few = self.pattern is not None and self.pattern.few_read is not None
        return min(own.length, own.prompt) if few else own.length

    def prompt_chunk(self, sequence: Cached, size: int) -> int:
        """Return how many tokens a pass takes; see `Engine.prompt_chunk`."""
        own = _own(sequence)
        if self._sparse_prefill is None:
            return size
        return block_chunk(own.length, own.prompt, size)

    def rows(self, sequence: Cached, layer: int) -> Tokens:
        """Return the positions of the rows held; see `Engine.rows`."""
        rows = _own(sequence).rows(layer)
        return np.array(np.broadcast_to(rows, (self.config.layers[layer].kv_heads, rows.shape[1])))

    def row_count(self, sequence: Cached) -> int:
        """Return how many rows the head with most holds."""
        return _own(sequence).row_count

    def track_attention(self, sequence: Cached) -> None:
        """Sum the attention that rows receive; see `Engine.track_attention`."""
        own = _own(sequence)
        if own.length:
            raise RequestError("attention can only be summed from the first position on")
        empty = torch.zeros(0, dtype=torch.float64, device=self._device)
        own.mass = [empty.expand(layer.kv_heads, 0) for layer in self.config.layers]

    def attention_mass(self, sequence: Cached, layer: int) -> NDArray[np.float64]:
        """Return the attention that rows received; see `Engine.attention_mass`."""
        own = _own(sequence)
        if own.mass is None:
            raise RequestError("this sequence does not track attention; `track_attention` does")
        return np.array(own.mass[layer].cpu().numpy(), np.float64)

    def keys_values(self, sequence: Cached, layer: int) -> tuple[Floats, Floats]:
        """Return cached keys and values; see `Engine.keys_values`."""
        own = _own(sequence)
        if Ability.KEYS not in self.abilities:
            raise RequestError("this model's layers cache latents, not keys and values")
        keys, values = own.layers[layer][:, :, : own.held(layer)].float()
        if self._grouped is not None:
            keys, values = rounded_rows(keys, values, self._grouped)
        return np.array(keys.cpu().numpy(), np.float32), np.array(values.cpu().numpy(), np.float32)

    def track_queries(self, sequence: Cached, window: int) -> None:
        """Keep the last queries; see `Engine.track_queries`."""
        own = _own(sequence)
        if own.length:
            raise RequestError("queries can only be kept from the first position on")
        if not 1 <= window <= self.config.context:
            raise RequestError(
                f"the window of queries is {window}, expected 1 to {self.config.context}"
            )
        own.window = window
        own.recent = [
            torch.zeros(each.heads, 0, each.head_dim, dtype=self.dtype, device=self._device)
            for each in self.config.layers
        ]

    def recent_queries(self, sequence: Cached, layer: int) -> Floats:
        """Return the last queries; see `Engine.recent_queries`."""
        own = _own(sequence)
        if not own.window:
            raise RequestError("this sequence does not track queries; `track_queries` does")
        queries = own.recent[layer].float().cpu().numpy() * np.float32(self.config.attention_scale)
        return np.array(queries, np.float32)

    def query_pages(self, positions: int) -> int:
        """Return the pages that tracked queries take; see `Engine.query_pages`."""
        size = sum(layer.heads * layer.head_dim for layer in self.config.layers)
        return -(-positions * size * self.dtype.itemsize // self.memory.page_bytes)

    def track_surprisal(self, sequence: Cached) -> None:
        """Keep the surprisal of tokens; see `Engine.track_surprisal`."""
        own = _own(sequence)
        if own.length:
            raise RequestError("surprisal can only be kept from the first position on")
        own.surprisals = Surprisals()

    def surprisal(self, sequence: Cached) -> NDArray[np.float64]:
        """Return the surprisal of tokens; see `Engine.surprisal`."""
        own = _own(sequence)
        if own.surprisals is None:
            raise RequestError("this sequence does not track surprisal; `track_surprisal` does")
        return own.surprisals.values

    @torch.inference_mode()
    def evict(self, sequence: Cached, kept: Sequence[ArrayLike]) -> None:
        """Drop all rows but `kept`; see `Engine.evict`."""
        own = _own(sequence)
        if self.pattern is not None:
            raise RequestError(
                f"rows cannot be evicted beside the attention pattern {self.pattern.name}"
            )
        rows = check_kept(self, own, kept)
        own.evict([self._tensor(keep.astype(np.int64)) for keep in rows])

    @torch.inference_mode()
    def append_rows(self, sequence: Cached, rows: Sequence[tuple[Floats, Floats]]) -> None:
        """Commit positions by keys and values; see `Engine.append_rows`."""
        own = _own(sequence)
        if Ability.APPEND_ROWS not in self.abilities:
            raise RequestError("cannot append rows: this cache does not take single rows")
        count = check_rows(self, own, rows)
        if own.positions is not None or own.mass is not None or own.window:
            raise RequestError(
                "cannot append rows: rows of this sequence were evicted, or attention or queries "
                "are tracked"
            )
        self._make_room([(own, count)])
        for index, (keys, values) in enumerate(rows):
            own.write(index, self._tensor(keys).to(self.dtype), self._tensor(values).to(self.dtype))
        own.extend(count)

    def release(self, sequence: Cached) -> None:
        """Give the memory back."""
        if isinstance(sequence, ReferenceCache):
            sequence.query_pages, sequence.surprisals = 0, None
            sequence.layers, sequence.pages, sequence.released = [], [], True

    def _make_room(self, more: Sequence[tuple[ReferenceCache, int]]) -> None:
        """Give each sequence pages for so many more positions."""
        ends = [(own, own.row_count + nodes) for own, nodes in more]
        queries = [
            self.query_pages(min(own.length + nodes, own.window)) if own.window else 0
            for own, nodes in more
        ]
        pages = sum(max(0, Memory.pages(end) - len(own.pages)) for own, end in ends)
        for (own, _), needed in zip(ends, queries, strict=True):
            pages += max(0, needed - own.query_pages)
        self._afford(pages)
        for (own, end), needed in zip(ends, queries, strict=True):
            own.resize(max(len(own.pages), Memory.pages(end)))
            own.query_pages = max(own.query_pages, needed)

    def _afford(self, pages: int) -> None:
        while (free := self.memory.free) is not None and pages > free:
            if self._lent(pages - free):
                continue
            raise MemoryFullError(
                f"{pages} more pages of keys and values are needed, free are {free} of "
                f"{self._limit}; wait for other requests, or raise the limit"
            )

    @torch.inference_mode()
    def _run(
        self,
        sequence: ReferenceCache,
        tree: TokenTree,
        rows: bool,
        view: View,
        mixed: tuple[Tokens, Floats] | None = None,
        given: Floats | None = None,
    ) -> Floats:
        """Run one tree and return its logits [exits + 1, N, V]; its rows stay uncommitted.

        `mixed` are the tokens and weights that its nodes mix instead of holding one token each,
        `given` the hidden states [N, hidden] of the layers before this part. A part without the
        last layers returns hidden states [1, N, hidden].
        """
        config, outer = self.config, self._outer
        positions = sequence.length + tree.depths().astype(np.int64)
        if given is None:
            tokens, shares = mixed or (tree.tokens[:, None], np.ones((len(tree), 1), np.float32))
            x = self._embed(tokens, shares, positions)
        else:
            x = self._tensor(given).to(self.dtype)
        sequence.pending = len(tree)
        sequence.viewed, sequence.weights, sequence.queries = view.partial, [], []
        tracked = bool(sequence.mass is not None or sequence.window) and not view.partial
        states, where = [], self._tensor(positions)
        chain = bool((tree.parents == np.arange(-1, len(tree) - 1)).all())
        if self._sparse_prefill is not None and not view.partial:
            check_blocks(sequence.length, len(tree), sequence.prompt, chain)
        run = range(len(config.layers)) if view.layers is None else view.layers
        for place, index in enumerate(run):
            if view.exits is not None and place in view.exits:
                states.append(x)
            layer, weights = config.layers[index], self._layers[index]
            seen = visible(sequence, index, layer, tree, view.positions)
            extend_cache: blocks.Cache = partial(self._cache, sequence, index)
            if self._grouped is not None:
                grouped = GroupedView.of(tree, sequence.length, seen, self._grouped)
                extend_cache = partial(self._cache_grouped, sequence, index, grouped)
                seen = grouped.seen
            mask = self._tensor(np.where(seen, 0, -np.inf).astype(np.float32))
            hidden: blocks.Mask = mask
            if self._mask is not None:
                hidden = self._mask.of_layer(sequence, index, mask, where, chain)
            elif layer.rope is not None and layer.rope.scaling == DUAL_CHUNK:
                hidden = partial(self._dual_chunks, sequence.length, where, layer.rope, mask)
            rotation = blocks.rotation_of(layer, where)
            cache: blocks.Cache | blocks.LatentCache = extend_cache
            if "latent" in weights:
                held = self._tensor(np.r_[: sequence.length, positions])
                extend = partial(sequence.write_latents, index)
                cache = blocks.LatentCache(extend, blocks.rotation_of(layer, held))
            tap = sequence.note if tracked else None
            if tracked and not layer.heads:
                sequence.note_nothing(mask, layer.head_dim)
            x = self._block(index, x, hidden, rotation, cache, tap)
        if self.part is not None and not self.part.ends:
            return np.asarray(x[None].float().cpu().numpy(), np.float32)
        if not rows:
            return np.empty((view.heads, 0, view.width(config.vocab_size)), np.float32)
        states = [blocks.final_state(state, config, outer) for state in [*states, x]]
        self._hidden.append(states[-1])
        return np.stack([self._logits(state, view) for state in states])

    def _block(self, index: int, x: Tensor, *args: Any) -> Tensor:
        """Run a layer over the nodes; see `blocks.block`."""
        return blocks.block(x, self.config, self.config.layers[index], self._layers[index], *args)

    def _embed(self, tokens: Tokens, shares: Floats, positions: NDArray[np.int64]) -> Tensor:
        """Return the input [N, hidden] of the first layer, of tokens and weights [N, K]."""
        config, outer = self.config, self._outer
        x = F.embedding(self._tensor(tokens.astype(np.int64)), outer["embed"])  # [N, K, hidden]
        x = (x * self._tensor(shares).to(self.dtype)[..., None]).sum(1)
        x = x * config.embedding_scale
        if config.learned_positions:
            x = x + outer["positions"][self._tensor(positions + config.position_offset)]
        return x

    def _logits(self, x: Tensor, view: View) -> Floats:
        """Return the logits of N states, [N, V]."""
        ids = None if view.tokens is None else self._tensor(view.tokens.astype(np.int64))
        logits = blocks.head(x, self.config, self._outer, ids)
        return np.asarray(logits.cpu().numpy(), np.float32)

    def _dual_chunks(
        self, length: int, at: Tensor, rope: Rope, mask: Tensor, queries: Tensor, keys: Tensor
    ) -> Tensor:
        """Return the mask with what dual chunk attention changes in scores, [H, N, S]."""
        held = torch.cat([torch.arange(length, device=at.device), at])
        return mask + score_change(queries, keys, at, held, rope, self.config)

    def _cache(
        self, sequence: ReferenceCache, index: int, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values [H_kv, N, D] behind the committed ones; return them all."""
        return sequence.write(index, keys, values)

    def _cache_grouped(
        self, sequence: ReferenceCache, index: int, view: GroupedView, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values in fp16; return those of the columns of a view."""
        rows = sequence.write(index, to_half(keys), to_half(values))
        return view.extend(*rows)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def _own(sequence: Cached) -> ReferenceCache:
    if not isinstance(sequence, ReferenceCache) or sequence.released:
        raise RequestError("this sequence was released, or belongs to another engine")
    return sequence
