"""The contract of a quantiser, and what most of them share: grids of groups, and packing."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.compress.base import Statistics, WeightCompressor
from paceline.registry import check_range

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear


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

    def pack(self, codes: Tensor) -> Linear:
        """Return the stored form of codes [out, in]."""
        import numpy as np

        from paceline.models.tensors import Grouped

        integers = codes.to("cpu").numpy().astype(np.uint8)
        zeros = self.zeros.numpy().astype(np.uint16)
        return Grouped(self.bits, integers, self.scales.numpy(), self.group, zeros)

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
    """

    bits: int = 4
    group: int = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        check_range(2, 8, self.name, bits=self.bits)
        check_range(0, 1 << 20, self.name, group=self.group)

    @abstractmethod
    def quantize(self, weight: Tensor, stats: Statistics) -> Linear:
        """Return the stored form of a matrix [out, in]."""

    def compress(self, weight: Tensor, stats: Statistics) -> Linear:
        """See `WeightCompressor`."""
        return self.quantize(weight, stats)

    def grid(self, weight: Tensor) -> Grid:
        """Return the grid that spans the smallest and largest weight of each group."""
        import torch
        from torch.nn import functional as F

        columns = weight.shape[1]
        group = self.group or columns
        padded = F.pad(weight, (0, -columns % group))
        groups = padded.reshape(len(weight), -1, group)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        top, half = 2**self.bits - 1, 2 ** (self.bits - 1)
        if self.symmetric:
            scales = torch.maximum(high / (half - 1), -low / half)
            zeros = torch.full_like(scales, half)
        else:
            scales = (high - low) / top
            zeros = torch.zeros_like(scales)
        scales = torch.where(scales > 0, scales, torch.ones_like(scales))
        if not self.symmetric:
            zeros = (-low / scales).round().clamp(0, top)
        return Grid(self.bits, group, scales, zeros)
