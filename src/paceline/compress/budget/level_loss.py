"""How far a model whose matrices have chosen levels is from its source, on a few texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from paceline.compress.allocate.base import Allocation
from paceline.models import blocks
from paceline.models.config import ModelConfig

_KEPT = 2  # allocations whose states between blocks are kept


@dataclass
class LevelLoss:
    """The divergence of compressed models from their source, in nats a token.

    Blocks that are compressed as in an allocation that was judged before are not run again.

    Attributes:
        config: the model's shape.
        outer: float32 tensors outside the layers.
        layer: reads the float32 tensors of a layer of the source by its index.
        matrix: returns a matrix, float32 [out, in], by layer, name and level.
        names: layer and name of each matrix of an allocation.
        tokens: int64 [B, T], the texts.
    """

    config: ModelConfig
    outer: Mapping[str, Tensor]
    layer: Callable[[int], Mapping[str, Tensor]]
    matrix: Callable[[int, str, int], Tensor]
    names: list[tuple[int, str]]
    tokens: Tensor
    _weights: list[dict[str, Tensor]] = field(init=False, repr=False)
    _levels: list[int] = field(init=False, repr=False)
    _source: Tensor = field(init=False, repr=False)
    _runs: dict[int, list[tuple[float, Allocation, list[Tensor]]]] = field(
        init=False, repr=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        """Run the source once."""
        self._weights = [dict(self.layer(index)) for index in range(len(self.config.layers))]
        self._levels = [-1] * len(self.names)
        with torch.no_grad():
            states = self._run(len(self.tokens), 0, [])
            self._source = torch.cat(
                [self._log_probs(each) for each in torch.split(states[-1], 1)]
            ).half()

    @torch.no_grad()
    def __call__(self, allocation: Allocation, tokens: int) -> float:
        """Return the mean divergence over so many tokens, in whole texts, at least one."""
        rows = min(-(-tokens // self.tokens.shape[1]), len(self.tokens))
        self._set(allocation)
        runs = self._runs.setdefault(rows, [])
        first, known = 0, []
        for _, other, states in runs:
            same = self._common_blocks(allocation, other)
            if same > first:
                first, known = same, states[: same + 1]
        states = self._run(rows, first, known)
        total = 0.0
        for text, state in enumerate(torch.split(states[-1], 1)):
            source = self._source[text : text + 1].float()
            total += float(
                F.kl_div(self._log_probs(state), source, reduction="sum", log_target=True)
            )
        loss = total / (rows * self.tokens.shape[1])
        runs.append((loss, allocation, states))
        runs.sort(key=lambda run: run[0])
        del runs[_KEPT:]
        return loss

    def _set(self, allocation: Allocation) -> None:
        """Load the matrices whose levels changed."""
        for at, level in enumerate(allocation):
            if level != self._levels[at]:
                index, name = self.names[at]
                self._weights[index][name] = self.matrix(index, name, level)
                self._levels[at] = level

    def _common_blocks(self, one: Allocation, other: Allocation) -> int:
        """Return how many blocks, from the first on, two allocations have in common."""
        for (index, _), a, b in zip(self.names, one, other, strict=True):
            if a != b:
                return index
        return len(self.config.layers)

    def _run(self, rows: int, first: int, known: list[Tensor]) -> list[Tensor]:
        """Return the states [rows, T, hidden] before each block and behind the last one.

        Args:
            rows: texts.
            first: block to begin with.
            known: the states before it.
        """
        positions = torch.arange(self.tokens.shape[1])
        states = list(known)
        if not states:
            tokens = self.tokens[:rows]
            states = [blocks.embed(tokens, positions, self.config, self.outer)]
        for index in range(first, len(self.config.layers)):
            shape = self.config.layers[index]
            mask = blocks.causal_mask(positions, shape.window)
            rotation = blocks.rotation_of(shape, positions)
            states.append(
                blocks.block(states[-1], self.config, shape, self._weights[index], mask, rotation)
            )
        return states

    def _log_probs(self, state: Tensor) -> Tensor:
        final = blocks.final_state(state, self.config, self.outer)
        return F.log_softmax(blocks.head(final, self.config, self.outer), -1)
