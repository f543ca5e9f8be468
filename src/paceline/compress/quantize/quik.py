"""QUIK: 4 bits for weights and activations, but for the input channels with outliers."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from paceline.compress.base import Statistic, Statistics, WeightCompressor
from paceline.compress.column_errors import inverse_factor, keep_last
from paceline.compress.quantize.base import check_finite
from paceline.compress.quantize.grids.grid import Grid
from paceline.compress.quantize.grids.search import GridSearch
from paceline.core import Exactness
from paceline.registry import Source, check_range, quantizers

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear

_OUTLIER_BITS = 8


@quantizers.register("quik", Exactness.LOSSY)
@dataclass(frozen=True)
class QUIK(WeightCompressor):
    """Keep the input channels with the largest activations in more bits, and round the rest to 4.

    Codes of whole rows, chosen one input after another; errors move into the inputs that come
    later, and those with outliers, which have 8 bits, come last. Activations are rounded at each
    position. The reference engine computes what such products would; no kernel does.

    Attributes:
        bits: of weights outside of outlier channels, 2 to 8. Default 4.
        act_bits: of activations outside of them, 2 to 8. Default 4.
        outliers: share of the input channels that is kept apart, 0 to 0.5. Default 0.0625.
        damping: as of gptq. Default 0.01.
    """

    bits: int = 4
    act_bits: int = 4
    outliers: float = 0.0625
    damping: float = 0.01

    source = Source(
        authors="Ashkboos et al.",
        title="QUIK: Towards End-to-end 4-Bit Inference on Generative Large Language Models",
        arxiv="2310.09259",
        section="section 3",
        note="outliers by root mean squares; their weights in 8 bits, activations as they are",
    )
    catalogue = (184,)
    missing = MappingProxyType(
        {184: "kernels for products of 4-bit integers: activations are rounded in torch only"}
    )
    examples = ("quik", "quik:act_bits=8,outliers=0.03")
    statistics = frozenset({Statistic.SECOND_MOMENT})
    plain_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range(2, 8, self.name, bits=self.bits, act_bits=self.act_bits)
        check_range(0.0, 0.5, self.name, outliers=self.outliers)
        check_range(0.0, 1.0, self.name, damping=self.damping)

    @property
    def quick(self) -> WeightCompressor:
        """Rounding to nearest of whole rows."""
        from paceline.compress.quantize.rtn import RoundToNearest

        return RoundToNearest(self.bits, 0, search=0)

    def compress(self, weight: Tensor, stats: Statistics) -> Linear:
        """See `WeightCompressor`."""
        import numpy as np
        import torch

        from paceline.models.tensors import RoundedInputs

        check_finite(weight, self.name)
        assert stats.second_moment is not None
        moment = stats.second_moment
        count = round(self.outliers * weight.shape[1])
        order, factor = _outliers_last(moment, count, self.damping, self.name)
        apart = order[weight.shape[1] - count :]
        plain = torch.ones(weight.shape[1], dtype=torch.bool)
        plain[apart] = False
        rest, codes = weight[:, order], torch.full_like(weight, 2 ** (self.bits - 1))
        grid = GridSearch(self.bits, True, 20).grid(
            torch.where(plain, weight, 0.0), weight.shape[1], moment.diagonal()
        )
        for at in range(weight.shape[1] - count):
            column = rest[:, at : at + 1]
            rounded = grid.round(column)
            codes[:, order[at]] = rounded[:, 0]
            error = (column - grid.values(rounded)) / factor[at, at]
            rest[:, at:] -= error * factor[at, at:]
        return RoundedInputs(
            self._stored(grid, codes, rest[:, weight.shape[1] - count :], apart),
            self.act_bits,
            apart.numpy().astype(np.int32),
            16,
        )

    def _stored(self, grid: Grid, codes: Tensor, outliers: Tensor, apart: Tensor) -> Linear:
        """Return the sum of the narrow codes and of the outlier channels in 8 bits."""
        import numpy as np

        from paceline.compress.quantize.rtn import RoundToNearest
        from paceline.models.tensors import LowRank, Sparse, Sum

        narrow = grid.pack(codes)
        if not len(apart):
            return narrow
        places = np.zeros((len(apart), codes.shape[1]), bool)
        places[np.arange(len(apart)), apart.numpy()] = True
        chosen = Sparse(places, np.ones(len(apart), np.float16), "F16")
        wide = RoundToNearest(_OUTLIER_BITS, 0).compress(outliers.contiguous(), Statistics())
        return Sum((narrow, LowRank(wide, chosen)))


@keep_last
def _outliers_last(moment: Tensor, count: int, damping: float, name: str) -> tuple[Tensor, Tensor]:
    """Return the columns, the `count` with the largest inputs last, and the factor so ordered."""
    import torch

    ranked = moment.diagonal().sort(descending=True, stable=True).indices
    order = torch.cat([ranked[count:].sort().values, ranked[:count].sort().values])
    return order, inverse_factor(moment, damping, name, order)
