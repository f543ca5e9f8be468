"""EasyQuant: outliers stay as they are, and the range of the others is optimised, without data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.compress.base import Statistics, WeightCompressor
from paceline.compress.quantize.base import check_finite
from paceline.compress.quantize.grids.grid import SMALLEST_SCALE, Grid, in_groups
from paceline.compress.quantize.grids.outliers import add_outliers
from paceline.core import Exactness
from paceline.registry import Source, check_range, quantizers

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear

_STARTS = (1.0, 0.85, 0.7, 0.55)  # shares of the range that descent starts from


@quantizers.register("easyquant", Exactness.LOSSY)
@dataclass(frozen=True)
class EasyQuant(WeightCompressor):
    """Keep weights apart that are far from their row's mean; descend on the scale of the others.

    Needs no data: the squared error of the weights is minimised.

    Attributes:
        bits: of a weight, 2 to 8. Default 4.
        group: inputs that share a scale; 0 is the whole row. Default 0.
        sigma: standard deviations of its row from which on a weight is kept apart in half
            precision, 1 to 100. Default 3.
        steps: of gradient descent on the scales from each start, 0 to 1000. Default 20.
    """

    bits: int = 4
    group: int = 0
    sigma: float = 3.0
    steps: int = 20

    source = Source(
        authors="Tang et al.",
        title="EasyQuant: An Efficient Data-free Quantization Algorithm for LLMs",
        arxiv="2403.02775",
        section="algorithm 1",
        note="steps are divided by the curvature, so that there is no learning rate; from "
        "several starts",
    )
    catalogue = (381,)
    examples = ("easyquant", "easyquant:bits=3,group=32,sigma=2.5")

    def __post_init__(self) -> None:
        check_range(2, 8, self.name, bits=self.bits)
        check_range(0, 1 << 20, self.name, group=self.group)
        check_range(1.0, 100.0, self.name, sigma=self.sigma)
        check_range(0, 1000, self.name, steps=self.steps)

    @property
    def keeps_zeros(self) -> bool:
        """See `WeightCompressor`."""
        return True

    @property
    def quick(self) -> WeightCompressor:
        """Rounding to nearest on the same grid, without outliers and descent."""
        from paceline.compress.quantize.rtn import RoundToNearest

        return RoundToNearest(self.bits, self.group, search=0)

    def compress(self, weight: Tensor, stats: Statistics) -> Linear:
        """See `WeightCompressor`."""
        import torch

        check_finite(weight, self.name)
        centred = weight - weight.mean(1, keepdim=True)
        apart = centred.abs() > self.sigma * centred.square().mean(1, keepdim=True).sqrt()
        rest = torch.where(apart, 0.0, weight)
        grid = self._descend(rest, apart)
        return add_outliers(weight, grid.pack(grid.round(rest)), apart)

    def _descend(self, weight: Tensor, apart: Tensor) -> Grid:
        """Return the grid with the least error on the way of gradient descent."""
        import torch

        group = self.group or weight.shape[1]
        groups, counted = in_groups(weight, group), in_groups(~apart, group).float()
        half = 2 ** (self.bits - 1)
        spans = torch.maximum(groups.amax(-1) / (half - 1), -groups.amin(-1) / half)
        best = self._stored(spans)
        least = torch.full_like(best, torch.inf)
        for start in _STARTS:
            scales = spans * start
            for _ in range(self.steps + 1):
                stored = self._stored(scales)
                codes = (groups / stored[..., None]).round().clamp(-half, half - 1) * counted
                missed = (codes * stored[..., None] - groups) * counted
                errors = missed.square().sum(-1)
                better = errors < least
                least, best = torch.where(better, errors, least), torch.where(better, stored, best)
                # The derivative by the scale, codes held, over the curvature.
                slope = (missed * codes).sum(-1) / codes.square().sum(-1).clamp(min=1e-12)
                if not bool((slope != 0).any()):
                    break
                scales = stored - slope
        return Grid(self.bits, group, best, torch.full_like(best, half))

    @staticmethod
    def _stored(scales: Tensor) -> Tensor:
        return scales.half().float().clamp(min=SMALLEST_SCALE)
