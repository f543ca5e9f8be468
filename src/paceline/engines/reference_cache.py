"""Keys and values of one sequence in torch, and what is known of each row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from paceline.core import Tokens, TokenTree
from paceline.engines.pages import PAGE, Memory
from paceline.engines.read_memory import ReadMemory
from paceline.engines.surprisals import Surprisals
from paceline.errors import RequestError
from paceline.models.config import LayerConfig


@dataclass(eq=False)
class ReferenceCache:
    """Keys and values of one sequence: [2, H_kv, pages * PAGE, D] for each layer.

    Of a layer with latents of r numbers, these: [1, 1, pages * PAGE, r].

    The rows that a layer holds are committed; the `pending` rows after them are those of the last
    forward, which was `viewed` if it used a part of the model only.

    Attributes:
        numbers: gives each page a number, never the same twice.
        length: positions committed so far, evicted ones too.
        positions: int32 [H_kv, R] of each layer; None while no row was evicted. Of a head that
            holds fewer rows than another the first are -1: nobody sees them.
        evicted: length at the last eviction.
        prompt: positions below it are a prompt's, see `Engine.set_prompt`.
        mass: float64 [H_kv, R] of each layer; None where attention is not tracked.
        weights: attention of the pending nodes, float64 [H_kv, N, R + N] for each layer.
        window: positions whose queries are kept; 0 where they are not tracked.
        recent: queries [H, W, D] of the last positions, for each layer.
        query_pages: pages that these are counted as.
        surprisals: of committed tokens; None where they are not tracked.
        queries: those of the pending nodes [H, N, D], for each layer.
        memory: what an attention pattern remembers; None: nothing.
    """

    numbers: Iterator[int]
    layers: list[Tensor] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    length: int = 0
    pending: int = 0
    viewed: bool = False
    released: bool = False
    positions: list[Tokens] | None = None
    evicted: int = 0
    prompt: int = 0
    mass: list[Tensor] | None = None
    weights: list[Tensor] = field(default_factory=list)
    window: int = 0
    recent: list[Tensor] = field(default_factory=list)
    query_pages: int = 0
    surprisals: Surprisals | None = None
    queries: list[Tensor] = field(default_factory=list)
    memory: ReadMemory | None = None

    def held(self, layer: int) -> int:
        """Return how many committed rows a layer holds."""
        return self.length if self.positions is None else self.positions[layer].shape[1]

    @property
    def row_count(self) -> int:
        """Committed rows of the layer with most."""
        if self.positions is None:
            return self.length
        return max((positions.shape[1] for positions in self.positions), default=0)

    def rows(self, layer: int) -> Tokens:
        """Return the positions of a layer's rows, int32 [1 or H_kv, R]."""
        if self.positions is None:
            return np.arange(self.length, dtype=np.int32)[None]
        return self.positions[layer]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values [H_kv, N, D] behind the committed ones; return them all."""
        start, cache = self.held(layer), self.layers[layer]
        end = start + keys.shape[1]
        cache[0, :, start:end], cache[1, :, start:end] = keys, values
        return cache[0, :, :end], cache[1, :, :end]

    def write_latents(self, layer: int, latents: Tensor) -> Tensor:
        """Write new latents [N, r] behind the committed ones; return them all."""
        start, cache = self.held(layer), self.layers[layer]
        end = start + len(latents)
        cache[0, 0, start:end] = latents
        return cache[0, 0, :end]

    def note(self, name: str, value: Tensor) -> None:
        """Keep a layer's queries and attention weights for `commit`: a tap of `models.blocks`."""
        if name == "queries" and self.window:
            self.queries.append(value)
        if name == "attention" and self.mass is not None:
            kv_heads = self.layers[len(self.weights)].shape[1]
            grouped = value.view(kv_heads, -1, *value.shape[1:])
            self.weights.append(grouped.double().sum(1))

    def note_nothing(self, mask: Tensor, head_dim: int) -> None:
        """Keep the place of a layer without attention, whose mask would be [N, R + N]."""
        if self.window:
            self.queries.append(mask.new_empty(0, len(mask), head_dim))
        if self.mass is not None:
            self.weights.append(mask.new_empty(0, *mask.shape).double())

    def commit(self, nodes: Tensor) -> None:
        """Move the rows of `nodes` int64 [A] to the end of the committed ones."""
        for index, layer in enumerate(self.layers):
            held = self.held(index)
            layer[:, :, held : held + len(nodes)] = layer[:, :, nodes + held]
        if self.mass is not None:
            masses = zip(self.mass, self.weights, strict=True)
            self.mass = [_add_weights(mass, weights, nodes) for mass, weights in masses]
        if self.surprisals is not None:
            self.surprisals.commit(nodes.cpu().numpy())
        if self.memory is not None:
            self.memory.commit(nodes)
        if self.window:
            joined = (
                torch.cat([old, new[:, nodes]], 1)
                for old, new in zip(self.recent, self.queries, strict=True)
            )
            self.recent = [queries[:, -self.window :] for queries in joined]
        end = self.length + len(nodes)
        if self.positions is not None:
            fresh = np.arange(self.length, end, dtype=np.int32)
            self.positions = [np.hstack([p, np.tile(fresh, (len(p), 1))]) for p in self.positions]
        self._settle(end)

    def extend(self, count: int) -> None:
        """Commit so many rows that were written behind the committed ones."""
        self._settle(self.length + count)

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on; see `Engine.truncate`."""
        if not 0 <= length <= self.length:
            raise RequestError(f"cannot cut {self.length} positions to {length}")
        if 0 < length < self.evicted:
            raise RequestError(
                f"cannot cut to {length} positions: rows were evicted at {self.evicted}"
            )
        if self.mass is not None and 0 < length < self.length:
            raise RequestError(
                f"cannot cut to {length} positions: the attention of later ones was summed"
            )
        if self.window and 0 < length < self.length:
            raise RequestError(
                f"cannot cut to {length} positions: queries of earlier ones were dropped"
            )
        if self.surprisals is not None:
            self.surprisals.truncate(length)
        if self.memory is not None:
            self.memory.truncate(length)
        if not length:
            self.recent = [queries[:, :0] for queries in self.recent]
            self.positions, self.evicted = None, 0
            self.mass = None if self.mass is None else [mass[:, :0] for mass in self.mass]
            self.query_pages = 0
        elif self.positions is not None:  # everything behind the last eviction is held
            cut = self.length - length
            self.positions = [p[:, : p.shape[1] - cut] for p in self.positions]
        self._settle(length)

    def evict(self, kept: list[Tensor]) -> None:
        """Drop all rows but `kept`, int64 [H_kv, K] for each layer."""
        positions = []
        for index, (keep, layer) in enumerate(zip(kept, self.layers, strict=True)):
            old = np.broadcast_to(self.rows(index), (len(keep), self.held(index)))
            positions.append(np.take_along_axis(old, keep.cpu().numpy(), 1))
            positions[-1][keep.cpu().numpy() < 0] = -1
            taken = keep.clamp(min=0)
            wide = taken[None, :, :, None].expand(2, -1, -1, layer.shape[3])
            layer[:, :, : keep.shape[1]] = layer.gather(2, wide) * (keep >= 0)[None, :, :, None]
            if self.mass is not None:
                self.mass[index] = self.mass[index].gather(1, taken) * (keep >= 0)
        self.positions, self.evicted = positions, self.length
        self._settle(self.length)

    def fork(self) -> ReferenceCache:
        """Return an independent copy of the committed rows."""
        pages = Memory.pages(self.row_count)
        return ReferenceCache(
            self.numbers,
            [layer[:, :, : pages * PAGE].clone() for layer in self.layers],
            [next(self.numbers) for _ in range(pages)],
            self.length,
            positions=self.positions,
            evicted=self.evicted,
            prompt=self.prompt,
            mass=None if self.mass is None else list(self.mass),
            window=self.window,
            recent=list(self.recent),
            query_pages=self.query_pages,
            surprisals=None if self.surprisals is None else self.surprisals.fork(),
            memory=None if self.memory is None else self.memory.fork(),
        )

    def resize(self, pages: int) -> None:
        """Let the cache have so many pages, at least as many as its committed rows take."""
        if pages == len(self.pages):
            return
        for index, old in enumerate(self.layers):
            held = self.held(index)
            self.layers[index] = old.new_empty(*old.shape[:2], pages * PAGE, old.shape[3])
            self.layers[index][:, :, :held] = old[:, :, :held]
        del self.pages[pages:]
        self.pages += [next(self.numbers) for _ in range(pages - len(self.pages))]

    def _settle(self, length: int) -> None:
        """Forget the last pass, and give back the pages that the committed rows do not take."""
        self.length, self.pending, self.viewed = length, 0, False
        self.weights, self.queries = [], []
        self.resize(Memory.pages(self.row_count))


def visible(
    cache: ReferenceCache,
    index: int,
    layer: LayerConfig,
    tree: TokenTree,
    rows: Tokens | None,
) -> np.ndarray:
    """Return who sees whom, bool [N, R + N], or [H, N, R + N] where heads hold different rows.

    A node sees the held rows, its own ancestors and itself, as far as the layer's window allows.

    Args:
        cache: holds R rows in this layer.
        index: of the layer.
        layer: its shape.
        tree: N nodes.
        rows: indices of the rows that are seen; None: all.
    """
    held, n = cache.held(index), len(tree)
    seen: np.ndarray = np.zeros((n, held + n), bool)
    seen[:, slice(held) if rows is None else rows] = True
    for node, parent in enumerate(tree.parents):
        if parent >= 0:
            seen[node] = seen[parent]
        seen[node, held + node] = True
    own = cache.rows(index)
    if layer.window is None and not (own < 0).any():
        return seen
    positions = cache.length + tree.depths()
    columns = np.hstack([own, np.tile(positions, (len(own), 1))])  # [1 or H_kv, R + N]
    near = np.repeat((columns >= 0)[:, None], n, 1)  # [1 or H_kv, N, R + N]
    if layer.window is not None:
        near &= layer.near(positions[:, None] - columns[:, None], columns[:, None])
    if len(near) == 1:
        return np.asarray(seen & near[0])
    return np.repeat(seen & near, layer.heads // len(own), 0)


def _add_weights(mass: Tensor, weights: Tensor, path: Tensor) -> Tensor:
    """Return the mass [H_kv, R + A] with the attention of A nodes of a path added, one by one.

    Args:
        mass: float64 [H_kv, R].
        weights: float64 [H_kv, N, R + N], of all nodes of the pass.
        path: int64 [A].
    """
    held = mass.shape[1]
    mass = F.pad(mass, (0, len(path)))
    for node in path.tolist():
        mass[:, :held] += weights[:, node, :held]
        mass[:, held:] += weights[:, node, held + path]
    return mass
