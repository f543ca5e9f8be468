"""GPTQ: columns one after another, each error made up for by the columns that are still to come."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from paceline.compress.base import Statistic, Statistics
from paceline.compress.column_errors import inverse_factor, keep_last, replace_columns
from paceline.compress.quantize.base import Quantizer
from paceline.compress.quantize.grids.grid import SMALLEST_SCALE, Grid, join
from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.registry import Source, check_range, quantizers

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear


@quantizers.register("gptq", Exactness.LOSSY)
@dataclass(frozen=True)
class GPTQ(Quantizer):
    """Round column by column, and move the error of each into the columns after it.

    Minimises the squared error of the outputs on the calibration texts. The grid of a group is
    chosen when its first column is reached, from the weights as they are then; errors count there
    by what the later columns cannot make up for.

    Attributes:
        bits: as of every quantiser.
        group: as of every quantiser.
        symmetric: as of every quantiser.
        search: as of every quantiser.
        levels: as of every quantiser.
        scale_bits: as of every quantiser.
        mean_bits: as of every quantiser.
        damping: share of the mean diagonal of the second moment that is added to it, 0 to 1.
            Default 0.01.
        order: `activation`: columns with large inputs first, groups staying together; `given`: as
            they stand. Default activation.
        passes: of coordinate descent over the codes afterwards, 0 to 20. Default 0.
    """

    damping: float = 0.01
    order: str = "activation"
    passes: int = 0

    source = Source(
        authors="Frantar et al.",
        title="GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        arxiv="2210.17323",
        section="section 3, algorithm 1",
        note="groups, and columns within a group, are sorted by activation, so that each group "
        "keeps its place; passes of coordinate descent are ours",
    )
    examples: ClassVar[tuple[str, ...]] = (
        "gptq:group=32",
        "gptq:bits=3,group=32,symmetric=false,order=given",
        "gptq:bits=3,group=16,scale_bits=6,passes=2",
        "gptq:group=32,levels=learned",
    )
    statistics = frozenset({Statistic.SECOND_MOMENT})

    def __post_init__(self) -> None:
        Quantizer.__post_init__(self)
        check_range(0.0, 1.0, self.name, damping=self.damping)
        check_range(0, 20, self.name, passes=self.passes)
        if self.order not in ("activation", "given"):
            raise MethodError(f"{self.name}:order is {self.order!r}, expected activation or given")

    def quantize(self, weight: Tensor, stats: Statistics) -> Linear:
        """Return codes whose errors make up for each other."""
        import torch

        assert stats.second_moment is not None
        moment, columns = stats.second_moment, weight.shape[1]
        group = self.group or columns
        order, factor = ordered_factor(moment, self.order, group, self.damping, self.name)
        importance = factor.diagonal() ** -2.0  # what an error costs that later columns make up for
        importance = importance / importance.mean()
        search = self.grid_search(weight, importance[order.argsort()])
        codes = torch.empty_like(weight)
        grids: dict[int, Grid] = {}

        def round_column(at: int, rest: Tensor) -> Tensor:
            place = int(order[at]) // group
            if place not in grids:  # the columns of a group follow one another
                size = min(group, columns - place * group)
                seen = importance[at : at + size]
                grids[place] = search.grid(rest[:, at : at + size], size, seen)
            grid = grids[place]
            rounded = grid.round(rest[:, at : at + 1])
            if stats.kept is not None:  # what was pruned stays zero; its error moves on
                rounded = rounded.where(stats.kept[:, order[at], None], grid.zeros)
            codes[:, at : at + 1] = rounded
            return grid.values(rounded)

        replace_columns(weight[:, order], factor, round_column)
        back = order.argsort()
        chosen = join([grids[place] for place in range(len(grids))], group)
        empty = weight.abs().amax(1, keepdim=True) == 0  # rows, which tables may have no zero for
        chosen = replace(chosen, scales=chosen.scales.masked_fill(empty, SMALLEST_SCALE))
        return chosen.pack(self._descend(weight, stats, chosen, codes[:, back]))

    def _descend(self, weight: Tensor, stats: Statistics, grid: Grid, codes: Tensor) -> Tensor:
        """Return codes with less error: each column once more, given all others, in each pass."""
        moment = stats.second_moment
        assert moment is not None
        diagonal = moment.diagonal().clamp(min=1e-12)
        values = grid.values(codes)
        for _ in range(self.passes):
            for at in range(weight.shape[1]):
                slope = (values - weight) @ moment[:, at]
                wanted = values[:, at] - slope / diagonal[at]
                column = grid.column(at)
                rounded = column.round(wanted[:, None])
                if stats.kept is not None:
                    rounded = rounded.where(stats.kept[:, at, None], column.zeros)
                codes[:, at] = rounded[:, 0]
                values[:, at] = column.values(rounded)[:, 0]
        return codes


@keep_last
def ordered_factor(
    moment: Tensor, order: str, group: int, damping: float, name: str
) -> tuple[Tensor, Tensor]:
    """Return the order of the columns, [in], and the inverse factor of the moment in that order.

    Args:
        moment: the second moment of the inputs, [in, in].
        order: `given`, or `activation`: groups whole, the most important first.
        group: columns that share a scale.
        damping: as of `inverse_factor`.
        name: of the method, for messages.

    Raises:
        MethodError: as `inverse_factor`.
    """
    import torch

    if order == "given":
        return torch.arange(len(moment)), inverse_factor(moment, damping, name)
    places = _by_activation(moment.diagonal(), group)
    return places, inverse_factor(moment, damping, name, places)


def _by_activation(importance: Tensor, group: int) -> Tensor:
    import torch
    from torch.nn import functional as F

    columns = len(importance)
    grouped = F.pad(importance, (0, -columns % group), value=-1.0).reshape(-1, group)
    means = grouped.clamp(min=0).sum(1) / (grouped >= 0).sum(1)
    within = grouped.sort(dim=1, descending=True, stable=True).indices
    within = within + torch.arange(len(grouped))[:, None] * group
    order = within[means.sort(descending=True, stable=True).indices].flatten()
    return order[order < columns]
