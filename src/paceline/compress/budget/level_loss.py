"""How far a model whose matrices have chosen levels is from its source, on a few texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from paceline.compress.allocate.base import Allocation
from paceline.compress.structure.base import kept_tensors
from paceline.compress.whole_model import WholeModel, run_block
from paceline.models.config import LayerConfig

_BATCH, _RATE = 2, 5e-3  # of the training of norms and biases
_KEPT = 2  # allocations whose states between blocks are kept


@dataclass
class LevelLoss:
    """The divergence of compressed models from their source, in nats a token.

    Blocks that are compressed as in an allocation that was judged before are not run again.

    Attributes:
        source: the model as it was, and the texts.
        matrix: returns a matrix, float32 [out, in], by layer, name and level.
        names: layer and name of each matrix of an allocation.
    """

    source: WholeModel
    matrix: Callable[[int, str, int], Tensor]
    names: list[tuple[int, str]]
    _weights: list[dict[str, Tensor]] = field(init=False, repr=False)
    _shapes: list[LayerConfig] = field(init=False, repr=False)
    _levels: list[int] = field(init=False, repr=False)
    _wanted: list[Tensor] = field(init=False, repr=False)  # log-probabilities of each text
    _runs: dict[int, list[tuple[float, Allocation, list[Tensor]]]] = field(
        init=False, repr=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        """Run the source once."""
        layers = range(len(self.source.config.layers))
        self._weights = [dict(self.source.layer(index)) for index in layers]
        self._shapes = list(self.source.config.layers)
        self._levels = [-1] * len(self.names)
        with torch.no_grad():
            [*_, last] = self._run(len(self.source.texts), 0, [])
            self._wanted = [self.source.log_probs(each).half() for each in last]

    @torch.no_grad()
    def __call__(self, allocation: Allocation, tokens: int) -> float:
        """Return the mean divergence over so many tokens, in whole texts, at least one."""
        count, length = self.source.texts.shape
        rows = min(-(-tokens // length), count)
        self._set(allocation)
        runs = self._runs.setdefault(rows, [])
        first, known = 0, []
        for _, other, states in runs:
            same = self._common_blocks(allocation, other)
            if same > first:
                first, known = same, states[: same + 1]
        states = self._run(rows, first, known)
        total = 0.0
        for wanted, state in zip(self._wanted, states[-1], strict=False):
            found = self.source.log_probs(state)
            total += float(F.kl_div(found, wanted.float(), reduction="sum", log_target=True))
        loss = total / (rows * length)
        runs.append((loss, allocation, states))
        runs.sort(key=lambda run: run[0])
        del runs[_KEPT:]
        return loss

    def after_training(self, allocation: Allocation, tokens: int) -> float:
        """Return the divergence after norms and biases were trained on so many tokens.

        It is of texts that were held out; training begins at the levels each time.
        """
        from paceline.compress.reconstruct.recovery import Recovery, TrainedLayer

        count, length = self.source.texts.shape
        rows = min(max(2, -(-2 * tokens // length)), count)
        self._set(allocation)
        kept = [
            (shape, weights)
            for shape, weights in zip(self._shapes, self._weights, strict=True)
            if shape.heads or shape.intermediate
        ]
        teacher = replace(self.source.in_memory, texts=self.source.texts[:rows])
        generator = torch.Generator().manual_seed(0)
        layers = [
            TrainedLayer(kept_tensors(each, shape), "norms", 1, generator) for shape, each in kept
        ]
        recovery = Recovery(teacher.with_layers(kept), teacher, layers, _BATCH, False)
        size = min(_BATCH, len(recovery.split.trained)) * length
        recovery.train(max(1, round(tokens / size)), _RATE, None)
        with torch.no_grad():
            return recovery.error(recovery.trained_weights())

    def _set(self, allocation: Allocation) -> None:
        """Load the matrices whose levels changed."""
        for at, level in enumerate(allocation):
            if level != self._levels[at]:
                self._load(*self.names[at], level)
                self._levels[at] = level

    def _load(self, index: int, name: str, level: int) -> None:
        """Put a unit at a level into the model."""
        self._weights[index][name] = self.matrix(index, name, level)

    def _common_blocks(self, one: Allocation, other: Allocation) -> int:
        """Return how many blocks, from the first on, two allocations have in common."""
        for (index, _), a, b in zip(self.names, one, other, strict=True):
            if a != b:
                return index
        return len(self.source.config.layers)

    def _run(self, rows: int, first: int, known: list[Tensor]) -> list[Tensor]:
        """Return the states [rows, T, hidden] before each block and behind the last one.

        Args:
            rows: texts.
            first: block to begin with.
            known: the states before it.
        """
        states = known or [self.source.embed(self.source.texts[:rows])]
        config = self.source.config
        for index in range(first, len(config.layers)):
            shape, x = self._shapes[index], states[-1]
            if shape.heads or shape.intermediate:
                x = run_block(config, shape, self._weights[index], x)
            states.append(x)
        return states
