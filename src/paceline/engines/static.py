"""The torch engine with static shapes: its passes are CUDA graphs where there is CUDA."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast
from weakref import finalize

import numpy as np
import torch
from torch import Tensor

from paceline.abilities import Ability
from paceline.core import Floats, Tokens, TokenTree
from paceline.engines.base import Cached, Engine
from paceline.engines.pages import PAGE, Memory
from paceline.engines.reference import ReferenceEngine
from paceline.engines.reference_cache import ReferenceCache
from paceline.engines.static_pass import Rotations, StaticPass, pass_numbers
from paceline.engines.view import View
from paceline.errors import MethodError, RequestError
from paceline.models.config import ModelConfig
from paceline.models.tensors import Linear

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80)
SMALLEST_SPAN = 256
LARGEST_CAPACITY = 4096  # that no caller has asked for


@dataclass(eq=False)
class Slot:
    """Memory of one sequence at a time, and the passes that are bound to its addresses.

    Attributes:
        stacks: keys and values of layers of one shape, [layers, 2, G, rows, D] each.
        layers: those of each layer, views of the stacks.
        passes: by nodes and span.
    """

    stacks: list[Tensor]
    layers: list[Tensor]
    passes: dict[tuple[int, int], StaticPass] = field(default_factory=dict)


@dataclass(eq=False)
class StaticCache(ReferenceCache):
    """One sequence in a slot. Its memory neither grows nor shrinks."""

    slot: Slot = field(default_factory=lambda: Slot([], []))

    def resize(self, pages: int) -> None:
        """Count so many pages; the memory stays."""
        del self.pages[pages:]
        self.pages += [next(self.numbers) for _ in range(pages - len(self.pages))]

    def commit(self, nodes: Tensor) -> None:
        """Move the rows of `nodes` int64 [A] to the end of the committed ones, in all layers."""
        count = len(nodes)
        for stack in self.slot.stacks:
            stack[..., self.length : self.length + count, :] = stack[..., nodes + self.length, :]
        self._settle(self.length + count)


class StaticEngine(ReferenceEngine):
    """Runs a model in torch in passes of a few sizes, on CUDA as graphs.

    A pass over a tree takes the smallest of `sizes` that holds it and attends to the smallest power
    of two of rows; what is too much is masked. Larger trees (prompts), views and mixtures run as in
    the reference engine, over the same memory. Every sequence takes room for `capacity` positions.

    Args:
        config: the model's shape.
        weights: canonical name -> float32 array or stored matrix; read layer by layer.
        device: any torch device.
        dtype: of weights, activations, keys and values.
        capacity: most positions of a sequence, which becomes the context of `config`; None: the
            model's context, at most 4096.
        sizes: nodes that passes have, ascending.
        compiled: whether `torch.compile` fuses the kernels of passes; each size and span takes it
            about a minute.

    Raises:
        MethodError: torch has no such device here, or a size or the capacity is not positive.
        ModelError: a tensor holds NaN or infinite values.
    """

    name = "static"
    abilities = ReferenceEngine.abilities - {
        Ability.EVICT,
        Ability.ATTENTION_MASS,
        Ability.QUERIES,
    }
    track_queries = Engine.track_queries
    recent_queries = Engine.recent_queries
    track_attention = Engine.track_attention
    attention_mass = Engine.attention_mass
    evict = Engine.evict

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Linear | Floats],
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        capacity: int | None = None,
        sizes: Sequence[int] = SIZES,
        compiled: bool = False,
    ) -> None:
        if not sizes or min(sizes) < 1 or list(sizes) != sorted(set(sizes)):
            raise MethodError(f"sizes is {list(sizes)}, expected ascending numbers of nodes")
        if capacity is not None and capacity < 1:
            raise MethodError(f"capacity is {capacity}, expected a positive number of positions")
        self.capacity = min(config.context, LARGEST_CAPACITY if capacity is None else capacity)
        super().__init__(replace(config, context=self.capacity), weights, device, dtype)
        self.sizes = tuple(sizes)
        self._compiled = compiled
        self._spare = self.capacity + self.sizes[-1]  # behind a tree at the last position
        self._rows = self._spare + self.sizes[-1]
        self._rotations = Rotations(config, self.capacity, self._device)
        self._free: list[Slot] = []
        self._ends: dict[int, finalize[[Slot], StaticCache]] = {}
        cuda = self._device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if cuda else None

    def _take_latents(self, weights: Mapping[str, Linear | Floats]) -> None:
        """Leave keys and values as they are: their memory is reserved by heads."""

    @property
    def memory(self) -> Memory:
        """Refuse to count pages: requests cannot share what each takes as a whole.

        Raises:
            MethodError: always.
        """
        raise MethodError(
            "the static engine gives every sequence its whole cache at once, so that requests "
            "cannot share a limit of memory (kv_limit); run them one by one, or take the reference "
            "engine"
        )

    def _afford(self, pages: int) -> None:
        """Allow every pass: the memory is reserved."""

    def open(self) -> Cached:
        """Open a new, empty sequence."""
        return self._open(0)

    def fork(self, sequence: Cached) -> Cached:
        """Return an independent copy of the committed positions."""
        own = self._own(sequence)
        other = self._open(own.length)
        for stack, copied in zip(own.slot.stacks, other.slot.stacks, strict=True):
            copied[..., : own.length, :] = stack[..., : own.length, :]
        return other

    def release(self, sequence: Cached) -> None:
        """Give the slot back."""
        if isinstance(sequence, StaticCache) and not sequence.released:
            sequence.released, sequence.pages, sequence.layers = True, [], []
            self._ends.pop(id(sequence.slot))()

    def _open(self, length: int) -> StaticCache:
        slot = self._free.pop() if self._free else self._slot()
        cache = StaticCache(self._numbers, list(slot.layers), length=length, slot=slot)
        cache.resize(-(-length // PAGE))
        self._ends[id(slot)] = finalize(cache, self._free.append, slot)
        self._live.add(cache)
        return cache

    def _slot(self) -> Slot:
        """Allocate the memory of one more sequence."""
        shapes = [(layer.kv_heads, layer.head_dim) for layer in self.config.layers]
        stacks = {
            (heads, dim): torch.zeros(
                shapes.count((heads, dim)),
                *(2, heads, self._rows, dim),
                dtype=self.dtype,
                device=self._device,
            )
            for heads, dim in dict.fromkeys(shapes)
        }
        places = [shapes[:index].count(shape) for index, shape in enumerate(shapes)]
        layers = [stacks[shape][place] for shape, place in zip(shapes, places, strict=True)]
        return Slot(list(stacks.values()), layers)

    def _own(self, sequence: Cached) -> StaticCache:
        if not isinstance(sequence, StaticCache) or sequence.released:
            raise RequestError("this sequence was released, or belongs to another engine")
        return sequence

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
        """Run one tree and return its logits [exits + 1, N, V]; its rows stay uncommitted."""
        own, n = self._own(sequence), len(tree)
        if own.length + n > self._spare:
            raise RequestError(
                f"{own.length} positions and {n} nodes are more than the {self._spare} rows of the "
                "static engine; propose smaller trees, or take the reference engine"
            )
        whole = not view.partial and view.tokens is None and view.exits is None
        if not whole or mixed is not None or n > self.sizes[-1]:
            return super()._run(sequence, tree, rows, view, mixed, given)
        size = self.sizes[bisect_left(self.sizes, n)]
        numbers = pass_numbers(tree, own.length, size, self._spare)
        states, logits = self._pass(own.slot, size, own.length + n).run(numbers)
        own.pending, own.viewed, own.weights = n, False, []
        if not rows:
            return np.empty((1, 0, self.config.vocab_size), np.float32)
        self._hidden.append(states[:n].clone())
        return _to_host(logits[:n])[None]

    def _pass(self, slot: Slot, size: int, rows: int) -> StaticPass:
        """Return the pass of a slot that holds so many nodes and rows."""
        span = SMALLEST_SPAN
        while span < rows:
            span *= 2
        span = min(span, self._rows)
        found = slot.passes.get((size, span))
        if found is None:
            # No matrix stays in its stored form, and no checkpoint rounds activations here.
            layers = cast(list[dict[str, Tensor]], self._layers)
            found = slot.passes[size, span] = StaticPass(
                *(self.config, self._outer, layers, self._rotations, slot.layers),
                size=size,
                span=span,
                compiled=self._compiled,
                pool=self._pool,
            )
        return found


def _to_host(logits: Tensor) -> Floats:
    """Return a copy on the host; from a GPU by way of page-locked memory."""
    if logits.is_cuda:
        host = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True)
        host.copy_(logits, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return np.asarray(host.numpy(), np.float32)
    return np.array(logits.numpy(), np.float32)
