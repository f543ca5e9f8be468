"""Models some of whose channels and heads are switched off, and what that costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.compress.structure.widths.moments import Moments
from paceline.compress.structure.widths.pruner import parts_of, per_unit, unit_size
from paceline.compress.structure.widths.slicing import group_columns
from paceline.compress.whole_model import WholeModel, run_frozen

if TYPE_CHECKING:
    from torch import Tensor

_RIDGE = 0.05  # of the number of samples, on the diagonal of the normal equations


@dataclass(frozen=True, eq=False)
class Unit:
    """Channels, or a group of heads, that are switched off together.

    Attributes:
        layer: its index.
        name: `down` or `o`, the matrix whose inputs they are.
        members: int64, channels or groups.
        columns: int64, inputs of the matrix.
        prior: importance of a weight by activations.
        size: number of weights.
    """

    layer: int
    name: str
    members: Tensor
    columns: Tensor
    prior: float
    size: int


def units_of(model: WholeModel, multiple: int) -> list[Unit]:
    """Return all units of a model; channels of a layer with like priors make one.

    The prior of a channel is the root mean square of the input of `down` times the norm of its
    weights there; that of a group of heads is the same for `o`, mean over its inputs.
    """
    import torch

    units = []
    x = model.embed(model.texts)
    for index, shape in enumerate(model.config.layers):
        moments, weights = Moments(diagonal=True), model.layer(index)
        x = model.run(index, x, moments.tap())
        for name in parts_of(weights):
            norms = weights[name].double().square().sum(0).sqrt()
            prior = per_unit(moments.moment(name).double().sqrt() * norms, name, shape)
            size = unit_size(weights, shape, name)
            inputs = weights[name].shape[1] // len(prior)
            step = multiple if name == "down" else 1
            for members in torch.split(prior.argsort(stable=True), step):
                columns = members if name == "down" else group_columns(shape, members)
                importance = float(prior[members].sum()) * inputs / (size * len(members))
                units.append(Unit(index, name, members, columns, importance, size * len(members)))
    return units


def states_without(model: WholeModel, off: Sequence[Unit]) -> Tensor:
    """Return the last block's outputs [B, T, hidden] with some units switched off."""
    columns: dict[tuple[int, str], list[Tensor]] = defaultdict(list)
    for unit in off:
        columns[unit.layer, unit.name].append(unit.columns)
    x = model.embed(model.texts)
    for index, shape in enumerate(model.config.layers):
        weights = dict(model.layer(index))
        for name in parts_of(weights):
            if gone := columns.get((index, name)):
                weights[name] = weights[name].clone()
                for each in gone:
                    weights[name][:, each] = 0
        x = run_frozen(model.config, shape, weights, x)
    return x


def regressed(off: Tensor, losses: Tensor, prior: Tensor) -> Tensor:
    """Return what switching each unit off costs, float64 [units], by ridge regression.

    Coefficients are drawn towards a multiple of the prior, the one that fits the losses best, so
    that fewer samples than units do.

    Args:
        off: float64 [samples, units], 1 where a unit was switched off.
        losses: float64 [samples].
        prior: float64 [units], what their costs are expected to be proportional to.
    """
    import torch

    expected = off @ prior
    factor = float(expected @ losses / (expected @ expected).clamp(min=1e-30))
    start = prior * factor
    rest = losses - off @ start
    centred = off - off.mean(0)
    gram = centred.T @ centred + _RIDGE * len(off) * torch.eye(off.shape[1], dtype=off.dtype)
    found: Tensor = start + torch.linalg.solve(gram, centred.T @ (rest - rest.mean()))
    return found
