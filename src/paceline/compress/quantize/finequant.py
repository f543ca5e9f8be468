"""FineQuant: groups that are as large as the weights of a matrix allow."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from paceline.compress.base import Statistics
from paceline.compress.quantize.base import Quantizer
from paceline.compress.quantize.grids.grid import in_groups
from paceline.core import Exactness
from paceline.registry import Source, check_range, quantizers

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear


@quantizers.register("finequant", Exactness.LOSSY)
@dataclass(frozen=True)
class FineQuant(Quantizer):
    """Halve the groups of a matrix, from whole rows on, as long as that narrows their ranges.

    Looks at the weights alone. Matrices whose ranges are alike everywhere keep large groups, those
    with outliers take small ones.

    Attributes:
        bits: as of every quantiser.
        group: the smallest number of inputs that share a scale, at least 1. Default 32.
        symmetric: as of every quantiser.
        search: as of every quantiser.
        levels: as of every quantiser.
        scale_bits: as of every quantiser.
        mean_bits: as of every quantiser.
        gain: share by which the mean range must fall when groups are halved, 0 to 1. Default 0.07.
    """

    group: int = 32
    gain: float = 0.07

    source = Source(
        authors="Kim et al.",
        title="FineQuant: Unlocking Efficiency with Fine-Grained Weight-Only Quantization for LLMs",
        arxiv="2308.09723",
        section="section 3.3",
        note="for each matrix; scales are searched as those of rtn are",
    )
    catalogue = (19,)
    examples = ("finequant", "finequant:bits=3,group=8,symmetric=false,gain=0.02")

    def __post_init__(self) -> None:
        Quantizer.__post_init__(self)
        check_range(1, 1 << 20, self.name, group=self.group)
        check_range(0.0, 1.0, self.name, gain=self.gain)

    def quantize(self, weight: Tensor, stats: Statistics) -> Linear:
        """Return the nearest codes in groups of the size that is chosen."""
        chosen = replace(self, group=self.group_of(weight))
        grid = chosen.grid(weight)
        return grid.pack(grid.round(weight))

    def group_of(self, weight: Tensor) -> int:
        """Return how many inputs share a scale in a matrix."""
        columns = weight.shape[1]
        size = columns
        range_now = self._mean_range(weight, size)
        tried = 1 << max(columns - 1, 1).bit_length() - 1
        while tried >= self.group:
            narrower = self._mean_range(weight, tried)
            if tried < size and narrower >= range_now * (1 - self.gain):
                break
            size, range_now = min(tried, size), narrower
            tried //= 2
        return size

    @staticmethod
    def _mean_range(weight: Tensor, group: int) -> float:
        groups = in_groups(weight, group)
        return float((groups.amax(-1) - groups.amin(-1)).mean())
