"""The error of a block's outputs, and its minimisation by gradient descent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from paceline.compress.base import Block
from paceline.compress.reconstruct.descent import Descent
from paceline.compress.reconstruct.split import TextSplit

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.blocks import LayerWeights
    from paceline.models.tensors import Linear

_TINY = 1e-12


class Objective:
    """The error of a block's outputs on the calibration texts, position by position.

    The squared error of a position counts relative to the square of the output there, as the
    norms that follow see it; a few positions with huge outputs would decide alone otherwise. Some
    texts are held out; see `TextSplit`.

    Args:
        block: with the weights whose outputs are right.
        batch: texts that run at once.

    Raises:
        MethodError: as `TextSplit`.
    """

    def __init__(self, block: Block, batch: int) -> None:
        import torch

        self._block, self._batch = block, batch
        self._split = TextSplit(len(block.inputs), block.inputs.shape[1], batch, block.index)
        with torch.no_grad():
            parts = torch.split(block.inputs, batch)
            right = dict(block.weights)
            self._targets = torch.cat([block.run(right, part) for part in parts])

    def batches(self, steps: int) -> Iterator[Tensor]:
        """Yield indices of texts for each step, every text once before any comes again."""
        return self._split.batches(steps)

    def some_texts(self, count: int) -> Tensor:
        """Return the indices of the first texts of training, at most `count`."""
        return self._split.trained[:count]

    def loss(self, weights: LayerWeights, rows: Tensor) -> Tensor:
        """Return the mean relative squared error on texts of training, a scalar."""
        return self._loss(weights, rows, self._split.trained_positions)

    def _loss(self, weights: LayerWeights, rows: Tensor, positions: slice) -> Tensor:
        right = self._targets[rows, positions]
        lost = self._block.run(weights, self._block.inputs[rows])[:, positions] - right
        sizes = right.square().sum(-1).clamp(min=_TINY)
        return (lost.square().sum(-1) / sizes).mean()

    def probe(self, weights: LayerWeights, rows: Tensor) -> Tensor:
        """Return the outputs of some texts times random signs, a scalar.

        The expected square of its gradient by a parameter is the loss's curvature there
        (Gauss-Newton): a change by d adds it times d^2 to the loss.
        """
        import torch

        right = self._targets[rows, self._split.trained_positions]
        generator = torch.Generator().manual_seed(self._block.index)
        signs = torch.randint(0, 2, right.shape, generator=generator) * 2 - 1
        sizes = right.square().sum(-1, keepdim=True).clamp(min=_TINY)
        outputs = self._block.run(weights, self._block.inputs[rows])[
            :, self._split.trained_positions
        ]
        positions = right.numel() // right.shape[-1]
        probe: Tensor = (outputs * signs / sizes.sqrt()).sum() / math.sqrt(positions)
        return probe

    def error(self, weights: LayerWeights) -> float:
        """Return the error on the texts that are not trained on; not differentiable."""
        import torch

        with torch.no_grad():
            parts = torch.split(self._split.held, self._batch)
            at = self._split.held_positions
            total = sum(float(self._loss(weights, rows, at)) * len(rows) for rows in parts)
        return total / len(self._split.held)


def train(
    objective: Objective,
    weights: Callable[[], LayerWeights],
    parameters: Sequence[tuple[Tensor, float]],
    steps: int,
    rate: float,
) -> None:
    """Minimise the error of a block's outputs, in place.

    Args:
        objective: the error.
        weights: of the block for the parameters as they are, differentiable.
        parameters: each with its factor of the rate.
        steps: of Adam.
        rate: at the beginning; see `Descent`.

    Raises:
        MethodError: the error is no number any more.
    """
    descent = Descent(parameters, steps, rate)
    for rows in objective.batches(steps):
        descent.step(objective.loss(weights(), rows))


def dense_weights(block: Block, stored: Mapping[str, Linear]) -> dict[str, Tensor]:
    """Return the weights of a block with what some matrices are stored as in their place."""
    import torch

    return block.weights | {name: torch.from_numpy(each.dense()) for name, each in stored.items()}


def round_through(values: Tensor) -> Tensor:
    """Round to whole numbers; the gradient passes as if nothing happened."""
    return values + (values.round() - values).detach()
