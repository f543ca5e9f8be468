"""The reference engine: any family, any torch device, plain and slow. What others are held to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional as F

from paceline.abilities import Ability
from paceline.core import Floats, Tokens, TokenTree
from paceline.engines.base import Cached, Engine, Rows, wanted
from paceline.engines.pages import PAGE, Memory
from paceline.engines.view import View
from paceline.errors import MemoryFullError, MethodError, RequestError
from paceline.models import blocks
from paceline.models.config import ModelConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_Layer = dict[str, Tensor]


@dataclass(eq=False)
class _Sequence:
    """Keys and values of one sequence: [2, H_kv, pages * PAGE, D] for each layer.

    Rows up to `length` are committed; the `pending` rows after them are those of the last forward,
    which was `viewed` if it used a part of the model only.
    """

    length: int = 0
    pending: int = 0
    viewed: bool = False
    layers: list[Tensor] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)  # a number for each, never given twice
    released: bool = False


class ReferenceEngine(Engine):
    """Runs a model in torch, sequence by sequence.

    Args:
        config: the model's shape.
        weights: canonical name -> float32 array; read layer by layer.
        device: any torch device.
        dtype: of weights and activations; norms and softmax are computed in float32.
        kv_limit: most bytes that cached keys and values may take, see `Engine.kv_limit`.

    Raises:
        MethodError: torch has no such device here.
        ModelError: a tensor holds NaN or infinite values.
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
        }
    )

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Floats],
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        kv_limit: int | None = None,
    ) -> None:
        self.config = config
        self._device = _device(device)
        self.device = str(self._device)
        self.dtype = dtype
        self.format = next(name for name, known in DTYPES.items() if known == dtype)
        self.kv_format = self.format
        self._live: WeakSet[_Sequence] = WeakSet()
        self._numbers = count()
        self._limit: int | None = None
        self._outer: _Layer = {}
        self._hidden: list[Tensor] = []  # of the last forward, [N, hidden] for each tree
        self._layers: list[_Layer] = [{} for _ in config.layers]
        for name in weights:
            tensor = torch.tensor(weights[name]).to(self._device, dtype)
            if name.startswith("layers."):
                _, index, rest = name.split(".", 2)
                self._layers[int(index)][rest] = tensor
            else:
                self._outer[name] = tensor
        if kv_limit is not None:
            self.kv_limit = kv_limit

    @property
    def memory(self) -> Memory:
        """The pages of keys and values now. No page is shared."""
        row = sum(2 * layer.kv_heads * layer.head_dim for layer in self.config.layers)
        used = sum(len(sequence.pages) for sequence in self._live)
        return Memory(PAGE * row * self.dtype.itemsize, used, 0, used, self._limit)

    def _limit_pages(self, pages: int | None) -> None:
        used = self.memory.used
        if pages is not None and used > pages:
            raise MethodError(
                f"{used} pages are in memory, more than {pages}; release sequences first"
            )
        self._limit = pages

    def pages(self, sequence: Cached) -> Sequence[int]:
        """What tells the pages of a sequence from all others."""
        return list(_own(sequence).pages)

    def open(self) -> Cached:
        """A new, empty sequence."""
        sequence = _Sequence(
            layers=[
                torch.empty(
                    2, layer.kv_heads, 0, layer.head_dim, dtype=self.dtype, device=self._device
                )
                for layer in self.config.layers
            ]
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
        for cached, tree in batch:
            self.check(cached, tree, view)
        rowed = wanted(rows, batch)
        self._make_room([(_own(cached), len(tree)) for cached, tree in batch])
        self._hidden = []
        view = view or View()
        columns = view.width(self.config.vocab_size)
        none = np.empty((view.heads, 0, columns), np.float32)
        runs = zip(batch, rowed, strict=True)
        logits = [self._run(_own(s), tree, want, view) for (s, tree), want in runs]
        return np.concatenate([none, *logits], 1).reshape(-1, columns)

    def hidden(self) -> Floats:
        """Hidden states of the last pass; see `Engine.hidden`."""
        if not self._hidden:
            raise RequestError("the last pass made no logits, so that it has no hidden states")
        return np.asarray(torch.cat(self._hidden).float().cpu().numpy(), np.float32)

    def forward_mixed(self, sequence: Cached, tokens: Tokens, weights: Floats) -> Floats:
        """Run a chain of mixed nodes; see `Engine.forward_mixed`."""
        own = _own(sequence)
        self.check_mixed(own, tokens, weights)
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
        end = own.length + len(nodes)
        kept = torch.from_numpy(nodes + own.length).to(self._device)
        for layer in own.layers:
            layer[:, :, own.length : end] = layer[:, :, kept]
        own.length, own.pending = end, 0
        self._resize(own, Memory.pages(end))

    def truncate(self, sequence: Cached, length: int) -> None:
        """Forget all positions from `length` on."""
        own = _own(sequence)
        if not 0 <= length <= own.length:
            raise RequestError(f"cannot cut {own.length} positions to {length}")
        own.length, own.pending, own.viewed = length, 0, False
        self._resize(own, Memory.pages(length))

    @torch.inference_mode()
    def fork(self, sequence: Cached) -> Cached:
        """An independent copy of the committed positions."""
        own = _own(sequence)
        pages = Memory.pages(own.length)
        self._afford(pages)
        other = _Sequence(
            length=own.length,
            layers=[layer[:, :, : pages * PAGE].clone() for layer in own.layers],
            pages=[next(self._numbers) for _ in range(pages)],
        )
        self._live.add(other)
        return other

    def release(self, sequence: Cached) -> None:
        """Give the memory back."""
        if isinstance(sequence, _Sequence):
            sequence.layers, sequence.pages, sequence.released = [], [], True

    def _make_room(self, more: Sequence[tuple[_Sequence, int]]) -> None:
        """Let sequences have pages for so many more positions each."""
        ends = [(own, own.length + nodes) for own, nodes in more]
        self._afford(sum(max(0, Memory.pages(end) - len(own.pages)) for own, end in ends))
        for own, end in ends:
            self._resize(own, max(len(own.pages), Memory.pages(end)))

    def _afford(self, pages: int) -> None:
        while (free := self.memory.free) is not None and pages > free:
            if self._lent(pages - free):
                continue
            raise MemoryFullError(
                f"{pages} more pages of keys and values are needed, free are {free} of "
                f"{self._limit}; wait for other requests, or raise the limit"
            )

    @torch.inference_mode()
    def _resize(self, sequence: _Sequence, pages: int) -> None:
        """Let a sequence have so many pages, as many as its committed rows take at least."""
        if pages == len(sequence.pages):
            return
        for index, old in enumerate(sequence.layers):
            sequence.layers[index] = old.new_empty(2, old.shape[1], pages * PAGE, old.shape[3])
            sequence.layers[index][:, :, : sequence.length] = old[:, :, : sequence.length]
        del sequence.pages[pages:]
        sequence.pages += [next(self._numbers) for _ in range(pages - len(sequence.pages))]

    @torch.inference_mode()
    def _run(
        self,
        sequence: _Sequence,
        tree: TokenTree,
        rows: bool,
        view: View,
        mixed: tuple[Tokens, Floats] | None = None,
    ) -> Floats:
        """Logits [exits + 1, N, V] of one tree; its keys and values are left behind the others.

        `mixed` are the tokens and weights that its nodes mix instead of holding one token each.
        """
        config, outer = self.config, self._outer
        positions = sequence.length + tree.depths().astype(np.int64)
        visible = _visible(sequence.length, tree, view.positions)
        distance = positions[:, None] - np.r_[np.arange(sequence.length), positions]
        tokens, shares = mixed or (tree.tokens[:, None], np.ones((len(tree), 1), np.float32))
        x = F.embedding(self._tensor(tokens.astype(np.int64)), outer["embed"])  # [N, K, hidden]
        x = (x * self._tensor(shares).to(self.dtype)[..., None]).sum(1)
        x = x * config.embedding_scale
        if config.learned_positions:
            x = x + outer["positions"][self._tensor(positions + config.position_offset)]
        sequence.pending = len(tree)
        sequence.viewed = view.partial
        states, where = [], self._tensor(positions)
        run = range(len(config.layers)) if view.layers is None else view.layers
        for place, index in enumerate(run):
            if view.exits is not None and place in view.exits:
                states.append(x)
            layer, weights = config.layers[index], self._layers[index]
            seen = visible if layer.window is None else visible & (distance < layer.window)
            mask = self._tensor(np.where(seen, 0, -np.inf).astype(np.float32))
            rotation = blocks.rotation_of(layer, where)
            cache = partial(self._cache, sequence, index)
            x = blocks.block(x, config, layer, weights, mask, rotation, cache)
        if not rows:
            return np.empty((view.heads, 0, view.width(config.vocab_size)), np.float32)
        states = [blocks.norm(state, config, outer, "final_norm") for state in [*states, x]]
        self._hidden.append(states[-1])
        return np.stack([self._logits(state, view) for state in states])

    def _logits(self, x: Tensor, view: View) -> Floats:
        """Return the logits of N states, [N, V]."""
        ids = None if view.tokens is None else self._tensor(view.tokens.astype(np.int64))
        logits = blocks.head(x, self.config, self._outer, ids)
        return np.asarray(logits.cpu().numpy(), np.float32)

    def _cache(
        self, sequence: _Sequence, index: int, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values [H_kv, N, D] behind the committed ones; return them all."""
        start, end = sequence.length, sequence.length + keys.shape[1]
        cache = sequence.layers[index]
        cache[0, :, start:end], cache[1, :, start:end] = keys, values
        return cache[0, :, :end], cache[1, :, :end]

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise MethodError(f"torch cannot use the device {name!r} here: {reason}") from None
    return device


def _own(sequence: Cached) -> _Sequence:
    if not isinstance(sequence, _Sequence) or sequence.released:
        raise RequestError("this sequence was released, or belongs to another engine")
    return sequence


def _visible(length: int, tree: TokenTree, positions: Tokens | None) -> np.ndarray:
    """Who sees whom, [N, S + N]: committed positions (None: all), the own ancestors, oneself."""
    n = len(tree)
    visible = np.zeros((n, length + n), bool)
    visible[:, slice(length) if positions is None else positions] = True
    for node, parent in enumerate(tree.parents):
        if parent >= 0:
            visible[node] = visible[parent]
        visible[node, length + node] = True
    return visible
