"""The error of a block's outputs, and its minimisation by gradient descent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from paceline.compress.base import Block
from paceline.errors import MethodError

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear

_HELD = 8  # one of so many texts is not trained on; it decides whether training helped
_TINY = 1e-12


class Objective:
    """The error of a block's outputs on the calibration texts, position by position.

    The squared error of a position counts relative to the square of the output there, as the
    norms that follow see it; a few positions with huge outputs would decide alone otherwise.

    Args:
        block: with the weights whose outputs are right.
        batch: texts that run at once.
    """

    def __init__(self, block: Block, batch: int) -> None:
        import torch

        self._block, self._batch = block, batch
        count = len(block.inputs)
        held = max(1, count // _HELD)
        self._held = torch.arange(count - held, count)
        self._trained = torch.arange(max(1, count - held))
        with torch.no_grad():
            parts = torch.split(block.inputs, batch)
            right = dict(block.weights)
            self._targets = torch.cat([block.run(right, part) for part in parts])

    def batches(self, steps: int) -> Iterator[Tensor]:
        """Yield indices of texts for each step, every text once before any comes again."""
        import torch

        generator = torch.Generator().manual_seed(self._block.index)
        queue = torch.empty(0, dtype=torch.int64)
        size = min(self._batch, len(self._trained))
        for _ in range(steps):
            if len(queue) < size:
                order = torch.randperm(len(self._trained), generator=generator)
                queue = torch.cat([queue, self._trained[order]])
            yield queue[:size]
            queue = queue[size:]

    def loss(self, weights: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        """Return the mean relative squared error on some texts, a scalar."""
        right = self._targets[rows]
        lost = self._block.run(weights, self._block.inputs[rows]) - right
        sizes = right.square().sum(-1).clamp(min=_TINY)
        return (lost.square().sum(-1) / sizes).mean()

    def probe(self, weights: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        """Return the outputs of some texts times random signs, a scalar.

        The expected square of its gradient by a parameter is the loss's curvature there
        (Gauss-Newton): a change by d adds it times d^2 to the loss.
        """
        import torch

        right = self._targets[rows]
        generator = torch.Generator().manual_seed(self._block.index)
        signs = torch.randint(0, 2, right.shape, generator=generator) * 2 - 1
        sizes = right.square().sum(-1, keepdim=True).clamp(min=_TINY)
        outputs = self._block.run(weights, self._block.inputs[rows])
        positions = right.numel() // right.shape[-1]
        probe: Tensor = (outputs * signs / sizes.sqrt()).sum() / math.sqrt(positions)
        return probe

    def error(self, weights: Mapping[str, Tensor]) -> float:
        """Return the error on the texts that are not trained on; not differentiable."""
        import torch

        with torch.no_grad():
            parts = torch.split(self._held, self._batch)
            total = sum(float(self.loss(weights, rows)) * len(rows) for rows in parts)
        return total / len(self._held)


class Descent:
    """Adam with a rate that falls to zero by a cosine.

    Args:
        parameters: each with its factor of the rate.
        steps: that will be made.
        rate: at the beginning.
    """

    def __init__(self, parameters: Sequence[tuple[Tensor, float]], steps: int, rate: float) -> None:
        import torch

        groups = [{"params": [each], "share": factor} for each, factor in parameters]
        self._optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        self._steps, self._rate, self._done = steps, rate, 0

    def step(self, loss: Tensor) -> None:
        """Make a step against the gradient of a loss.

        Raises:
            MethodError: the loss is no number.
        """
        import torch

        if not bool(torch.isfinite(loss)):
            raise MethodError(f"training gave no number at step {self._done}; lower the rate")
        now = self._rate * 0.5 * (1 + math.cos(math.pi * self._done / self._steps))
        for group in self._optimizer.param_groups:
            group["lr"] = now * group["share"]
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        self._optimizer.step()
        self._done += 1


def train(
    objective: Objective,
    weights: Callable[[], Mapping[str, Tensor]],
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
