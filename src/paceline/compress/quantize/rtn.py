"""Round to nearest: the quantiser that others are measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.compress.base import Statistics
from paceline.compress.quantize.base import Quantizer
from paceline.core import Exactness
from paceline.registry import Source, quantizers

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear


@quantizers.register("rtn", Exactness.LOSSY)
@dataclass(frozen=True)
class RoundToNearest(Quantizer):
    """Round every weight to the nearest value of its group's grid. Needs no data.

    Where the inputs were measured for another method of the recipe, as by `awq`, the search for
    grids weighs errors by them.

    Attributes:
        bits: as of every quantiser.
        group: as of every quantiser.
        symmetric: as of every quantiser.
        search: as of every quantiser.
        levels: as of every quantiser.
        scale_bits: as of every quantiser.
        mean_bits: as of every quantiser.
    """

    source = Source(note="the usual baseline; no paper of its own")
    examples = (
        "rtn",
        "rtn:bits=8,group=0,search=0",
        "rtn:bits=3,group=64,symmetric=false",
        "rtn:group=32,scale_bits=6,levels=learned",
    )

    def quantize(self, weight: Tensor, stats: Statistics) -> Linear:
        """Return the nearest codes."""
        grid = self.grid(weight, stats.mean_squares)
        return grid.pack(grid.round(weight))

    def nearest(self, weight: Tensor, stats: Statistics) -> Tensor:
        """Return what the stored form of a matrix [out, in] would stand for, float32."""
        grid = self.grid(weight, stats.mean_squares)
        return grid.values(grid.round(weight))
