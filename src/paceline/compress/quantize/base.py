"""The contract of a quantiser, and what most of them share: settings and grids of groups."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from paceline.compress.base import Statistic, Statistics, WeightCompressor
from paceline.compress.quantize.grids.grid import Grid
from paceline.compress.quantize.grids.search import GridSearch, learned_levels
from paceline.errors import MethodError
from paceline.registry import check_range

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear


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
        levels: `even`: codes stand for whole numbers; `learned`: for a table of 2**bits numbers
            that is fitted to the matrix, up to 6 bits, with symmetric grids. Default even.
        scale_bits: scales are whole numbers of so many bits, 2 to 8, times a number for each row;
            0 keeps a half-precision number for each group. Default 0.
        mean_bits: of a code over all matrices, 2 to the most that `bits` may be, instead of `bits`:
            matrices whose rounding raises the loss more, by gradients on the calibration texts,
            take more bits than others; 0 gives all `bits`. Default 0.
    """

    bits: int = 4
    group: int = 128
    symmetric: bool = True
    search: int = 20
    levels: str = "even"
    scale_bits: int = 0
    mean_bits: float = 0.0

    def __post_init__(self) -> None:
        check_range(2, 8, self.name, bits=self.bits)
        check_range(0, 1 << 20, self.name, group=self.group)
        check_range(0, 100, self.name, search=self.search)
        if self.mean_bits:
            check_range(2.0, float(self.widest), self.name, mean_bits=self.mean_bits)
        if self.scale_bits not in (0, *range(2, 9)):
            raise MethodError(f"{self.name}:scale_bits is {self.scale_bits}, expected 0, or 2 to 8")
        if self.levels not in ("even", "learned"):
            raise MethodError(f"{self.name}:levels is {self.levels!r}, expected even or learned")
        if self.levels == "learned" and (self.bits > 6 or not self.symmetric):
            raise MethodError(
                f"{self.name}:levels=learned takes up to 6 bits and symmetric grids; leave it out, "
                "or change these"
            )

    @property
    def widest(self) -> int:
        """The most bits that a code may have."""
        return 6 if self.levels == "learned" else 8

    @property
    def optional_statistics(self) -> frozenset[Statistic]:
        """See `Compressor`."""
        return frozenset({Statistic.SENSITIVITY}) if self.mean_bits else frozenset()

    @property
    def keeps_zeros(self) -> bool:
        """See `WeightCompressor`: a table that is fitted may have no zero."""
        return self.levels == "even"

    def for_block(
        self, weights: Mapping[str, Tensor], stats: Mapping[str, Statistics]
    ) -> Mapping[str, WeightCompressor]:
        """Return the method with the bits of each matrix."""
        if not self.mean_bits:
            return dict.fromkeys(weights, self)
        chosen = {}
        for name in weights:
            extra = stats[name].extra_bits
            if extra is not None:
                bits = min(max(round(self.mean_bits + extra), 2), self.widest)
                chosen[name] = replace(self, bits=bits, mean_bits=0.0)
            else:
                chosen[name] = self
        return chosen

    @abstractmethod
    def quantize(self, weight: Tensor, stats: Statistics) -> Linear:
        """Return the stored form of a matrix [out, in]."""

    def compress(self, weight: Tensor, stats: Statistics) -> Linear:
        """See `WeightCompressor`.

        Raises:
            MethodError: weights are no numbers, or too large.
        """
        if self.mean_bits:
            raise MethodError(
                f"{self.name}:mean_bits needs gradients of the model, which were not computed for "
                f"this matrix; give bits instead"
            )
        check_finite(weight, self.name)
        return self.quantize(weight, stats)

    @property
    def quick(self) -> WeightCompressor:
        """Rounding to nearest on the same grid, without a search for scales."""
        from paceline.compress.quantize.rtn import RoundToNearest

        bits = round(self.mean_bits) or self.bits
        return RoundToNearest(bits, self.group, self.symmetric, search=0)

    def grid(self, weight: Tensor, importance: Tensor | None = None) -> Grid:
        """Return a grid for each group: the one that spans it, or a narrower one with less error.

        Scales are rounded as they are stored.

        Args:
            weight: float32 [out, in].
            importance: weights of the squared errors, float32 [in] or [out, in]; all alike by
                default.
        """
        group = self.group or weight.shape[1]
        return self.grid_search(weight, importance).grid(weight, group, importance)

    def grid_search(self, weight: Tensor, importance: Tensor | None = None) -> GridSearch:
        """Return what chooses the grids of a matrix: with its table of levels and coarse scales."""
        group = self.group or weight.shape[1]
        search = GridSearch(self.bits, self.symmetric, self.search, step_bits=self.scale_bits)
        if self.levels == "learned":
            levels = learned_levels(weight, search, group, importance)
            search = replace(search, levels=levels)
        return search.with_units(weight, group, importance)


def check_finite(weight: Tensor, name: str) -> None:
    """Refuse a matrix that holds what is no number.

    Raises:
        MethodError: names the method.
    """
    if not bool(weight.isfinite().all()):
        raise MethodError(
            f"a matrix [{weight.shape[0]}, {weight.shape[1]}] holds NaN or infinite weights; "
            f"{name} needs numbers, download the checkpoint again"
        )
