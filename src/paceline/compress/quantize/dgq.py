"""DGQ: fine groups of 4 bits inside coarse rows of 8 bits, for products of whole bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from paceline.compress.base import Statistic, Statistics
from paceline.compress.quantize.base import Quantizer
from paceline.compress.quantize.grids.grid import SMALLEST_SCALE, Grid
from paceline.compress.quantize.grids.search import GridSearch
from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.registry import Source, check_range, quantizers

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear

_BYTE = 127  # the largest whole number that a step and a code may make
_UNIT_BITS = 7  # of the coarse scales: times a step of 4 bits they are exact in half precision


@quantizers.register("dgq", Exactness.LOSSY)
@dataclass(frozen=True)
class DGQ(Quantizer):
    """Make each weight a coarse scale of its row times a whole number of 8 bits.

    That number is a fine scale of its group, also whole, times a code of 4 bits or fewer. Fine
    scales come first, those with the least weighted error; then the coarse scale of each row is
    searched with which the fine ones can be whole numbers.

    Attributes:
        bits: of a code, 2 to 4. Default 4.
        group: as of every quantiser. Default 32.
        symmetric: as of every quantiser. Default false.
        search: as of every quantiser.
        levels: must be left alone.
        scale_bits: of fine scales, 2 to 4. Default 4.
        mean_bits: must be left alone.
        coarse: coarse scales that are tried for each row, 1 to 200. Default 40.
    """

    group: int = 32
    symmetric: bool = False
    scale_bits: int = 4
    coarse: int = 40

    source = Source(
        authors="Zhang et al.",
        title="Dual Grained Quantization: Efficient Fine-Grained Quantization for LLM",
        arxiv="2310.04836",
        section="sections 3.2 and 3.3",
    )
    catalogue = (387,)
    missing = MappingProxyType(
        {387: "clipping of activations by percentiles, and kernels that multiply whole bytes"}
    )
    examples = ("dgq", "dgq:bits=3,group=16,symmetric=true")
    statistics = frozenset({Statistic.INPUT_NORM})

    def __post_init__(self) -> None:
        Quantizer.__post_init__(self)
        check_range(2, 4, self.name, bits=self.bits, scale_bits=self.scale_bits)
        check_range(1, 200, self.name, coarse=self.coarse)
        if self.levels != "even" or self.mean_bits:
            raise MethodError(
                f"{self.name} has whole numbers of 4 bits: leave levels and mean_bits"
            )

    def quantize(self, weight: Tensor, stats: Statistics) -> Linear:
        """Return the nearest codes of the best grid."""
        grid = self.grid(weight, stats.mean_squares)
        return grid.pack(grid.round(weight))

    def grid(self, weight: Tensor, importance: Tensor | None = None) -> Grid:
        """Return the fine grids, and the coarse scales with the least error of each row."""
        import torch

        group = self.group or weight.shape[1]
        fine = GridSearch(self.bits, self.symmetric, self.search).grid(weight, group, importance)
        share = torch.ones(weight.shape[1]) if importance is None else importance
        reach = torch.maximum(fine.zeros, 2**self.bits - 1 - fine.zeros)
        limit = (_BYTE / reach).floor().clamp(max=2**self.scale_bits - 1)
        spans = (fine.scales / limit).amax(1)
        best, least = None, torch.full_like(spans, torch.inf)
        for factor in torch.linspace(1.1, 0.5, self.coarse).tolist() if self.coarse > 1 else [1.0]:
            units = _short(spans * factor)[:, None]
            steps = torch.minimum((fine.scales / units).round().clamp(min=1), limit)
            tried = replace(
                fine,
                scales=(units * steps).half().float(),
                units=units[:, 0],
                steps=steps,
                step_bits=self.scale_bits,
            )
            errors = ((tried.values(tried.round(weight)) - weight).square() * share).sum(1)
            if best is None:
                best, least = tried, errors
                continue
            better = errors < least
            least = torch.where(better, errors, least)
            best = _rows_of(better, tried, best)
        assert best is not None
        return best


def _short(scales: Tensor) -> Tensor:
    """Return scales with 7 significant bits, above zero."""
    import torch

    fraction, power = torch.frexp(scales)
    rounded = torch.ldexp((fraction * 2**_UNIT_BITS).round() / 2**_UNIT_BITS, power)
    return rounded.half().float().clamp(min=SMALLEST_SCALE)


def _rows_of(chosen: Tensor, one: Grid, other: Grid) -> Grid:
    """Return the rows of one grid where they are chosen, and of another elsewhere."""
    import torch

    assert one.units is not None
    assert other.units is not None
    assert one.steps is not None
    assert other.steps is not None
    wide = chosen[:, None]
    return replace(
        one,
        scales=torch.where(wide, one.scales, other.scales),
        units=torch.where(chosen, one.units, other.units),
        steps=torch.where(wide, one.steps, other.steps),
    )
