"""NUPES: codes stand for a power function, whose exponent is searched for each matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from paceline.compress.quantize.gptq import GPTQ
from paceline.compress.quantize.grids.grid import TOP_LEVEL
from paceline.compress.quantize.grids.search import GridSearch
from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.registry import Source, check_range, quantizers

if TYPE_CHECKING:
    from torch import Tensor

_LOWEST, _HIGHEST = 0.6, 2.0  # exponents that are tried
_ROWS = 256  # of a matrix that the search looks at


@quantizers.register("nupes", Exactness.LOSSY)
@dataclass(frozen=True)
class NUPES(GPTQ):
    """Space the values of codes as a power of equal steps: finer near zero for exponents above 1.

    Power functions are the maps that keep products. The exponent is the one with the least
    weighted error of the matrix; the codes then make up for each other's errors over the whole
    range of codes, as those of gptq do.

    Attributes:
        bits: of a weight, 2 to 6. Default 4.
        group: as of every quantiser.
        symmetric: always true.
        search: as of every quantiser.
        levels: of a power function; must be left alone.
        scale_bits: as of every quantiser.
        mean_bits: as of every quantiser.
        damping: as of gptq.
        order: as of gptq.
        passes: as of gptq.
        exponents: that are tried between 0.6 and 2, 2 to 100. Default 15.
    """

    exponents: int = 15

    source = Source(
        authors="Yvinec et al.",
        title="NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search",
        arxiv="2308.05600",
        section="sections 3.1 and 3.2",
        note="an odd function of an even number of steps: no value is zero",
    )
    catalogue = (277,)
    missing = MappingProxyType(
        {277: "exponents are searched and codes chosen one after another, not both by gradients"}
    )
    examples = ("nupes:group=32", "nupes:bits=3,group=16,scale_bits=6")

    def __post_init__(self) -> None:
        GPTQ.__post_init__(self)
        check_range(2, self.widest, self.name, bits=self.bits)
        check_range(2, 100, self.name, exponents=self.exponents)
        if self.levels != "even" or not self.symmetric:
            raise MethodError(f"{self.name} has levels and a symmetry of its own; leave both out")

    @property
    def keeps_zeros(self) -> bool:
        """See `WeightCompressor`: no value is zero."""
        return False

    @property
    def widest(self) -> int:
        """See `Quantizer`."""
        return 6

    def grid_search(self, weight: Tensor, importance: Tensor | None = None) -> GridSearch:
        """Return what chooses the grids of a matrix, with the table of the best exponent."""
        import torch

        group = self.group or weight.shape[1]
        rows = weight[:: -(-len(weight) // _ROWS)]
        share = torch.ones(1, weight.shape[1]) if importance is None else importance
        best, least = None, torch.inf
        for exponent in torch.linspace(_LOWEST, _HIGHEST, self.exponents).tolist():
            search = GridSearch(
                self.bits, True, min(self.search, 10), power_levels(self.bits, exponent)
            )
            grid = search.grid(rows, group, share)
            lost = grid.values(grid.round(rows)) - rows
            error = float((lost.square() * share).sum())
            if best is None or error < least:
                best, least = search, error
        assert best is not None
        full = replace(best, search=self.search, step_bits=self.scale_bits)
        return full.with_units(weight, group, importance)


def power_levels(bits: int, exponent: float) -> Tensor:
    """Return a table of levels, `sign(t) |t| ** exponent` for equal steps of t from -1 to 1.

    Whole numbers from -127 to 127, no two alike.
    """
    import torch

    from paceline.compress.quantize.grids.search import whole_levels

    steps = torch.linspace(-1, 1, 2**bits, dtype=torch.float64)
    return whole_levels((steps.sign() * steps.abs() ** exponent * TOP_LEVEL).float())
