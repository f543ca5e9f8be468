"""Remove inputs of a matrix one unit after another, each time the one that costs least.

After "ZipLM" (Kurtic et al. 2023), section 3.1: the optimal brain surgeon for whole structures.
With the second moment C of the inputs and the weights W, removing the inputs S and fitting the
others by least squares costs tr(G W[:, S] (C^-1)[S, S]^-1 W[:, S]'), where G weighs errors of the
outputs. Afterwards W and C^-1 are those of the problem without S.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_DAMPING = 1e-3  # of the mean diagonal of the second moment


@dataclass(frozen=True)
class Removal:
    """The order in which units of inputs are removed.

    Attributes:
        order: int64, units; those behind it stay in any case.
        costs: float64, cumulative: of removing so many of `order`, from 0 on.
    """

    order: Tensor
    costs: Tensor


def damped(moment: Tensor) -> Tensor:
    """Return a second moment, float64 [in, in], that can be inverted."""
    import torch

    wide = moment.double()
    extra = _DAMPING * float(wide.diagonal().mean()) + 1e-12
    return wide + extra * torch.eye(len(wide), dtype=torch.float64)


def removal(weight: Tensor, moment: Tensor, weigh: Tensor, size: int, most: int) -> Removal:
    """Return which units go first, and what that costs.

    Args:
        weight: float32 [out, in].
        moment: [in, in], second moment of the inputs, mean over positions.
        weigh: [out, out], symmetric: how much errors of the outputs cost.
        size: inputs of a unit, which lie together.
        most: units to remove.
    """
    import torch

    w = weight.double()
    inverse = torch.linalg.inv(damped(moment))
    g = weigh.double()
    units = w.shape[1] // size
    left = torch.ones(units, dtype=torch.bool)
    order, costs = [], [0.0]
    for _ in range(most):
        found = _unit_costs(w, inverse, g, size).masked_fill(~left, torch.inf)
        unit = int(found.argmin())
        left[unit] = False
        order.append(unit)
        costs.append(costs[-1] + float(found[unit]))
        own = slice(unit * size, (unit + 1) * size)
        solved = torch.linalg.solve(inverse[own, own], inverse[own])  # [size, in]
        w = w - w[:, own] @ solved
        inverse = inverse - inverse[:, own] @ solved
        w[:, own] = 0
        inverse[own], inverse[:, own] = 0, 0
        inverse[own, own] = torch.eye(size, dtype=torch.float64)
    return Removal(torch.tensor(order, dtype=torch.int64), torch.tensor(costs))


def _unit_costs(w: Tensor, inverse: Tensor, g: Tensor, size: int) -> Tensor:
    """Return what the removal of each unit costs, float64 [units]."""
    import torch

    if size == 1:
        costs: Tensor = ((g @ w) * w).sum(0) / inverse.diagonal().clamp(min=1e-30)
        return costs
    units = w.shape[1] // size
    own = w.view(len(w), units, size).permute(1, 2, 0)  # [units, size, out]
    energy = own @ g @ own.mT  # [units, size, size]
    blocks = inverse.view(units, size, units, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    traces: Tensor = torch.linalg.solve(blocks, energy).diagonal(dim1=1, dim2=2).sum(1)
    return traces


def refit(cross: Tensor, moment: Tensor) -> Tensor:
    """Return the matrix, float32 [out, in], that fits outputs to inputs by least squares.

    Args:
        cross: [out, in], mean product of wanted outputs and inputs.
        moment: [in, in], second moment of the inputs.
    """
    import torch

    fitted: Tensor = torch.linalg.solve(damped(moment), cross.double().T).T.float().contiguous()
    return fitted
