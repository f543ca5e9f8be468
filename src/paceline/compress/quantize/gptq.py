"""GPTQ: columns one after another, each error made up for by the columns that are still to come."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from paceline.compress.base import Statistic, Statistics
from paceline.compress.quantize.base import Grid, Quantizer
from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.registry import Source, check_range, quantizers

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear

_TOGETHER = 128  # columns whose errors reach the rest of the matrix in one product


@quantizers.register("gptq", Exactness.LOSSY)
@dataclass(frozen=True)
class GPTQ(Quantizer):
    """Round column by column, and move the error of each into the columns after it.

    Minimises the squared error of the outputs on the calibration texts. The grid of a group is
    chosen when its first column is reached, from the weights as they are then.

    Attributes:
        bits: as of every quantiser.
        group: as of every quantiser.
        symmetric: as of every quantiser.
        search: as of every quantiser.
        damping: share of the mean diagonal of the second moment that is added to it, 0 to 1.
            Default 0.01.
    """

    damping: float = 0.01

    source = Source(
        authors="Frantar et al.",
        title="GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        arxiv="2210.17323",
        section="section 3, algorithm 1",
        note="columns in order, without sorting by activation",
    )
    examples = ("gptq:group=32", "gptq:bits=3,group=32,symmetric=false")
    statistics = frozenset({Statistic.SECOND_MOMENT})

    def __post_init__(self) -> None:
        Quantizer.__post_init__(self)
        check_range(0.0, 1.0, self.name, damping=self.damping)

    def quantize(self, weight: Tensor, stats: Statistics) -> Linear:
        """Return codes whose errors make up for each other."""
        import torch

        assert stats.second_moment is not None
        factor = inverse_factor(stats.second_moment, self.damping, self.name)
        rest, columns = weight.clone(), weight.shape[1]
        group = self.group or columns
        importance = stats.mean_squares
        codes = torch.empty_like(weight)
        grids: list[Grid] = []
        for start in range(0, columns, _TOGETHER):
            end = min(start + _TOGETHER, columns)
            errors = torch.empty(len(weight), end - start)
            for at in range(start, end):
                if at % group == 0:
                    ahead = slice(at, min(at + group, columns))
                    seen = None if importance is None else importance[ahead]
                    grids.append(replace(self, group=0).grid(rest[:, ahead], seen))
                column = rest[:, at : at + 1]
                rounded = grids[-1].round(column)
                codes[:, at : at + 1] = rounded
                error = (column - grids[-1].values(rounded)) / factor[at, at]
                rest[:, at:end] -= error * factor[at, at:end]
                errors[:, at - start] = error[:, 0]
            rest[:, end:] -= errors @ factor[start:end, end:]
        scales = torch.cat([grid.scales for grid in grids], 1)
        zeros = torch.cat([grid.zeros for grid in grids], 1)
        return Grid(self.bits, group, scales, zeros).pack(codes)


@lru_cache(maxsize=1)  # matrices with one input follow one another
def inverse_factor(moment: Tensor, damping: float, name: str) -> Tensor:
    """Return the upper Cholesky factor of the inverse of a damped second moment, [in, in].

    Raises:
        MethodError: it cannot be inverted.
    """
    import torch

    matrix = moment.double()
    diagonal = matrix.diagonal()
    dead = diagonal == 0
    matrix = matrix + torch.diag(dead.double() + damping * diagonal.mean().clamp(min=1e-12))
    try:
        lower = torch.linalg.cholesky(matrix)
        factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    except RuntimeError:
        raise MethodError(
            f"the inputs of a matrix are too alike on the calibration texts for {name}; give more "
            f"text, or raise {name}:damping={damping}"
        ) from None
    return factor.float()
