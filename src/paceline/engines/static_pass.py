"""A pass whose shapes do not depend on the token tree, so that a CUDA graph can hold it.

A graph records kernels with their addresses and sizes. Nodes are therefore padded to one of a few
sizes, and the rows that they attend to to one of a few spans; what else differs between passes
(tokens, positions, where rows are written, which nodes are ancestors) is read from one tensor that
is filled before each pass.

Axes: N nodes with padding, S rows of the span, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paceline.core import Floats, TokenTree
from paceline.models import blocks
from paceline.models.config import ModelConfig
from paceline.models.rope import Rope

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

WARM_UPS = 2  # passes before a graph is captured: libraries allocate their workspaces in them


def pass_numbers(tree: TokenTree, held: int, size: int, spare: int) -> NDArray[np.int64]:
    """Return what a pass of `size` nodes reads, int64 [3 * size + 1 + size * size].

    In order: tokens, positions and the rows that keys are written to, `size` each; the number of
    committed rows; for each node which nodes it sees. Nodes behind the tree repeat its root, and
    write to rows that nobody reads.

    Args:
        tree: at most `size` nodes.
        held: committed rows, the position of the root.
        size: nodes of the pass.
        spare: first row of those that nobody reads.
    """
    n = len(tree)
    seen = np.zeros((size, size), np.int64)
    for node, parent in enumerate(tree.parents):
        if parent >= 0:
            seen[node] = seen[parent]
        seen[node, node] = 1
    seen[n:, 0] = 1
    columns = np.empty((3, size), np.int64)
    columns[0, :n], columns[0, n:] = tree.tokens, tree.tokens[0]
    columns[1, :n], columns[1, n:] = held + tree.depths(), held
    columns[2] = np.where(np.arange(size) < n, held, spare) + np.arange(size)
    return np.concatenate([columns.ravel(), [held], seen.ravel()])


class Rotations:
    """The rotary tables of all positions that a cache has room for, on the device.

    Args:
        config: the model's shape.
        positions: how many.
        device: where they are used.
    """

    def __init__(self, config: ModelConfig, positions: int, device: torch.device) -> None:
        self._tables: dict[Rope, tuple[Tensor, Tensor, Tensor | None]] = {}
        for layer in config.layers:
            rope = layer.rope
            if rope is None or rope in self._tables:
                continue
            cos, sin = (torch.from_numpy(table).to(device) for table in rope.table(0, positions))
            scales: Floats | None = rope.query_scales(0, positions) if rope.query_growth else None
            growth = None if scales is None else torch.from_numpy(scales).to(device)[:, None]
            self._tables[rope] = cos, sin, growth

    def at(self, rope: Rope | None, positions: Tensor) -> blocks.Rotation | None:
        """Return the rotation of int64 positions [N]; None without rotary embedding."""
        if rope is None:
            return None
        cos, sin, growth = self._tables[rope]
        scales = None if growth is None else growth[positions]
        return blocks.Rotation(cos[positions], sin[positions], rope.adjacent, scales)


@dataclass(eq=False)
class StaticPass:
    """A pass of one size over one cache.

    Attributes:
        config: the model's shape.
        outer: its tensors outside the layers.
        layers: tensors of each layer.
        rotations: of all positions.
        cache: keys and values of each layer, [2, G, rows, D].
        size: nodes, N.
        span: rows that are attended to, S.
        compiled: whether `torch.compile` fuses its kernels.
        pool: of CUDA graphs that share memory; None computes every pass anew.
    """

    config: ModelConfig
    outer: blocks.LayerWeights
    layers: Sequence[Mapping[str, Tensor]]
    rotations: Rotations
    cache: Sequence[Tensor]
    size: int
    span: int
    compiled: bool = False
    pool: _POOL_HANDLE | None = None
    _graph: torch.cuda.CUDAGraph | None = field(default=None, init=False)
    _outputs: tuple[Tensor, Tensor] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        device = self.cache[0].device
        self._inputs = torch.zeros(
            3 * self.size + 1 + self.size**2, dtype=torch.int64, device=device
        )
        self._columns = torch.arange(self.span, device=device)
        self._run = self._compute
        if self.compiled:
            self._run = torch.compile(self._compute, fullgraph=True, dynamic=False)

    def run(self, numbers: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Run the pass that `pass_numbers` describes.

        Returns:
            Final states [N, hidden] and float32 logits [N, V], valid until any pass of the pool.
        """
        given = torch.from_numpy(numbers)
        self._inputs.copy_(given)
        if self.pool is None:
            return self._run()
        if self._graph is None:
            self._capture()
            self._inputs.copy_(given)  # a pass may change them
        return self.again()

    def again(self) -> tuple[Tensor, Tensor]:
        """Run the pass once more, with the inputs as they are on the device."""
        if self.pool is None:
            return self._run()
        assert self._graph is not None
        assert self._outputs is not None
        self._graph.replay()
        return self._outputs

    def _capture(self) -> None:
        """Record the pass as a CUDA graph."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self._outputs = self._run()
        self._graph = graph

    def _compute(self) -> tuple[Tensor, Tensor]:
        """Compute the pass from `_inputs`, without any size or value that the host must know."""
        size, config = self.size, self.config
        tokens, positions, rows = self._inputs[: 3 * size].view(3, size)
        held = self._inputs[3 * size]
        ancestors = self._inputs[3 * size + 1 :].view(size, size).bool()
        behind = self._columns - held  # of the committed rows: node 0 is 0
        node = behind.clamp(0, size - 1)
        seen = (behind < 0) | ((behind >= 0) & (behind < size) & ancestors[:, node])  # [N, S]
        at = torch.where(behind < 0, self._columns, positions[node])
        distance = positions[:, None] - at
        masks: dict[tuple[int | None, int], Tensor] = {}
        x = blocks.embed(tokens, positions, config, self.outer)
        for index, layer in enumerate(config.layers):
            shown = (layer.window, layer.sinks)
            if shown not in masks:
                near = seen & layer.near(distance, at)
                hidden = torch.full(near.shape, -torch.inf, device=x.device)
                masks[shown] = hidden.masked_fill(near, 0.0)
            rotation = self.rotations.at(layer.rope, positions)
            cache = partial(self._write, index, rows)
            mask = masks[shown]
            x = blocks.block(x, config, layer, self.layers[index], mask, rotation, cache)
        state = blocks.final_state(x, config, self.outer)
        return state, blocks.head(state, config, self.outer)

    def _write(
        self, index: int, rows: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values [G, N, D] to their rows; return those of the span."""
        cache = self.cache[index]
        cache[0].index_copy_(1, rows, keys)
        cache[1].index_copy_(1, rows, values)
        return cache[0, :, : self.span], cache[1, :, : self.span]
