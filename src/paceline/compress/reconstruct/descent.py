"""Adam with a learning rate that falls to zero: the one loop of everything that is trained here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from paceline.errors import MethodError

if TYPE_CHECKING:
    from torch import Tensor


class Descent:
    """Adam with a rate that falls to zero by a cosine, or in a line.

    Args:
        parameters: each with its factor of the rate.
        steps: that will be made.
        rate: at the beginning.
        linear: whether the rate falls in a line.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[Tensor, float]],
        steps: int,
        rate: float,
        linear: bool = False,
    ) -> None:
        import torch

        groups = [{"params": [each], "share": factor} for each, factor in parameters]
        self._optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        self._steps, self._rate, self._linear, self._done = steps, rate, linear, 0

    def step(self, loss: Tensor) -> None:
        """Make a step against the gradient of a loss.

        Raises:
            MethodError: the loss is no number.
        """
        import torch

        if not bool(torch.isfinite(loss)):
            raise MethodError(f"training gave no number at step {self._done}; lower the rate")
        done = self._done / self._steps
        left = 1 - done if self._linear else 0.5 * (1 + math.cos(math.pi * done))
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * left * group["share"]
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        self._optimizer.step()
        self._done += 1


def best_parameters(
    start: Sequence[Tensor],
    loss: Callable[[list[Tensor]], Tensor],
    steps: int,
    rate: float,
) -> list[Tensor]:
    """Return parameters that were trained, those of the step with the smallest loss.

    Args:
        start: float32, where training begins; not written to.
        loss: of some parameters, a scalar.
        steps: of training; 0 returns the parameters.
        rate: of each tensor, in units of its mean absolute value; it falls to 0 in a line.
    """
    import torch

    with torch.enable_grad():
        current = [each.clone().requires_grad_() for each in start]
        pairs = [(each, float(each.detach().abs().mean())) for each in current]
        descent = Descent(pairs, steps, rate, linear=True)
        best, smallest = list(start), float("inf")
        for step in range(steps + 1):
            value = loss(current)
            if float(value.detach()) < smallest:
                smallest = float(value.detach())
                best = [each.detach().clone() for each in current]
            if step == steps or not bool(torch.isfinite(value)):
                break
            descent.step(value)
    return best
