"""Adam with a learning rate that falls to zero: the one loop of everything that is trained here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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

        def backwards() -> float:
            torch.autograd.backward(loss)
            return float(loss.detach())

        self.step_by(backwards)

    def step_by(self, backwards: Callable[[], float]) -> None:
        """Make a step against gradients that a function adds to the parameters.

        Args:
            backwards: adds the gradients, and returns the loss.

        Raises:
            MethodError: the loss is no number.
        """
        done = self._done / self._steps
        left = 1 - done if self._linear else 0.5 * (1 + math.cos(math.pi * done))
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * left * group["share"]
        self._optimizer.zero_grad()
        if not math.isfinite(backwards()):
            raise MethodError(f"training gave no number at step {self._done}; lower the rate")
        self._optimizer.step()
        self._done += 1

    def state(self) -> dict[str, Tensor]:
        """Return the parameters and what Adam knows of them, by name, for `restore`."""
        found = {}
        for place, each in enumerate(self._parameters()):
            own = self._optimizer.state[each]
            found[f"{place}.value"] = each.detach()
            for name in ("exp_avg", "exp_avg_sq"):
                if name in own:
                    found[f"{place}.{name}"] = own[name]
        return found

    def restore(self, state: Mapping[str, Tensor], done: int) -> None:
        """Go on from a state after `done` steps."""
        import torch

        self._done = done
        for place, each in enumerate(self._parameters()):
            with torch.no_grad():
                each.copy_(state[f"{place}.value"])
            own = {name: state[f"{place}.{name}"] for name in ("exp_avg", "exp_avg_sq")}
            self._optimizer.state[each] = {"step": torch.tensor(float(done)), **own}

    def _parameters(self) -> list[Tensor]:
        return [each for group in self._optimizer.param_groups for each in group["params"]]


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
