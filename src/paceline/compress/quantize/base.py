"""The contract of a quantiser, and what most of them share: grids of groups, and packing."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.compress.base import Statistics, WeightCompressor
from paceline.errors import MethodError
from paceline.registry import check_range

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear


_NARROWEST = 0.6  # share of a range that the narrowest grid leaves out
_SMALLEST = 2.0**-24  # above zero in half precision


@dataclass(frozen=True)
class Grid:
    """The values that a row's groups can take: `(code - zero) * scale`, code 0 to 2**bits - 1.

    Attributes:
        bits: of a code.
        group: inputs that share a scale.
        scales: float32 [out, groups].
        zeros: float32 [out, groups], whole numbers.
    """

    bits: int
    group: int
    scales: Tensor
    zeros: Tensor

    def round(self, weight: Tensor) -> Tensor:
        """Return the codes, float32 [out, in], nearest to a matrix [out, in]."""
        scales, zeros = self._wide(weight.shape[1])
        return (weight / scales).round().add(zeros).clamp(0, 2**self.bits - 1)

    def values(self, codes: Tensor) -> Tensor:
        """Return what codes [out, in] stand for, float32."""
        scales, zeros = self._wide(codes.shape[1])
        return (codes - zeros) * scales

    def pack(self, codes: Tensor) -> Linear:
        """Return the stored form of codes [out, in]."""
        import numpy as np

        from paceline.models.tensors import Grouped

        integers = codes.to("cpu").numpy().astype(np.uint8)
        zeros = None
        if bool((self.zeros != 2 ** (self.bits - 1)).any()):
            zeros = self.zeros.numpy().astype(np.uint16)
        if not bool(self.scales.isfinite().all()):
            raise MethodError("the weights of a matrix are too large for scales in half precision")
        scales = np.ascontiguousarray(self.scales.numpy())
        return Grouped(self.bits, integers, scales, self.group, zeros, scale_type="F16")

    def _wide(self, columns: int) -> tuple[Tensor, Tensor]:
        return (
            self.scales.repeat_interleave(self.group, 1)[:, :columns],
            self.zeros.repeat_interleave(self.group, 1)[:, :columns],
        )


@dataclass(frozen=True)
class Quantizer(WeightCompressor):
    """Stores weights as small integers.

    Attributes:
        bits: of a weight, 2 to 8. Default 4.
        group: inputs that share a scale; 0 is the whole row. Default 128.
        symmetric: the grid is centred on zero; otherwise a zero point is chosen for each group.
            Default true.
        search: how many narrower grids are tried for each group, 0 to 100; the one with the
            smallest squared error counts, weighted by the inputs where they were measured.
            Default 20.
    """

    bits: int = 4
    group: int = 128
    symmetric: bool = True
    search: int = 20

    def __post_init__(self) -> None:
        check_range(2, 8, self.name, bits=self.bits)
        check_range(0, 1 << 20, self.name, group=self.group)
        check_range(0, 100, self.name, search=self.search)

    @abstractmethod
    def quantize(self, weight: Tensor, stats: Statistics) -> Linear:
        """Return the stored form of a matrix [out, in]."""

    def compress(self, weight: Tensor, stats: Statistics) -> Linear:
        """See `WeightCompressor`."""
        return self.quantize(weight, stats)

    @property
    def quick(self) -> WeightCompressor:
        """Rounding to nearest on the same grid, without a search for scales."""
        from paceline.compress.quantize.rtn import RoundToNearest

        return RoundToNearest(self.bits, self.group, self.symmetric, search=0)

    def grid(self, weight: Tensor, importance: Tensor | None = None) -> Grid:
        """Return a grid for each group: the one that spans it, or a narrower one with less error.

        Scales are rounded to half precision, as they are stored.

        Args:
            weight: float32 [out, in].
            importance: weights of the squared errors, float32 [in]; all alike by default.
        """
        import torch
        from torch.nn import functional as F

        columns = weight.shape[1]
        group = self.group or columns
        padded = F.pad(weight, (0, -columns % group))
        groups = padded.reshape(len(weight), -1, group)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        best = self._span(low, high, group)
        if not self.search:
            return best
        share = torch.ones(columns) if importance is None else importance
        shares = F.pad(share, (0, -columns % group)).reshape(1, -1, group)

        def error(grid: Grid) -> Tensor:
            rounded = grid.values(grid.round(padded)) - padded
            return (rounded.reshape(groups.shape).square() * shares).sum(-1)

        least = error(best)
        for step in range(1, self.search + 1):
            factor = 1 - _NARROWEST * step / self.search
            grid = self._span(low * factor, high * factor, group)
            found = error(grid)
            better = found < least
            least = torch.where(better, found, least)
            scales = torch.where(better, grid.scales, best.scales)
            best = Grid(self.bits, group, scales, torch.where(better, grid.zeros, best.zeros))
        return best

    def _span(self, low: Tensor, high: Tensor, group: int) -> Grid:
        """Return the grid that spans ranges [out, groups]."""
        import torch

        top, half = 2**self.bits - 1, 2 ** (self.bits - 1)
        if self.symmetric:
            scales = torch.maximum(high / (half - 1), -low / half)
            zeros = torch.full_like(scales, half)
        else:
            scales = (high - low) / top
            zeros = torch.zeros_like(scales)
        scales = scales.half().float()  # beyond its range: checked when it is packed
        scales = torch.where(scales > 0, scales, torch.full_like(scales, _SMALLEST))
        if not self.symmetric:
            zeros = (-low / scales).round().clamp(0, top)
        return Grid(self.bits, group, scales, zeros)
