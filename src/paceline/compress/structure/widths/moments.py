"""What is measured of the inputs of `o` and `down`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from paceline.compress.structure.widths.slicing import READERS

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Moments:
    """First and second moments of the inputs of some matrices, over all positions.

    Attributes:
        count: positions.
        sums: float64 [in] by the name of the matrix.
        squares: float32 [in, in], sums of x x'; or of squares [in] where `diagonal`.
        diagonal: whether products of different inputs are left out.
    """

    diagonal: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)

    def tap(self) -> Callable[[str, Tensor], None]:
        """Return a tap of `models.blocks` that adds what it sees."""

        def add(name: str, x: Tensor) -> None:
            if name not in READERS:
                return
            flat = x.detach().flatten(0, -2)
            products = flat.square().sum(0).double() if self.diagonal else flat.T @ flat
            sums = flat.double().sum(0)
            if name in self.sums:
                products, sums = products + self.squares[name], sums + self.sums[name]
            self.counts[name] = self.counts.get(name, 0) + len(flat)
            self.squares[name], self.sums[name] = products, sums

        return add

    def mean(self, name: str) -> Tensor:
        """Return the mean of each input, float64 [in]."""
        return self.sums[name] / self.counts[name]

    def moment(self, name: str) -> Tensor:
        """Return the second moment, [in, in], or [in] where `diagonal`."""
        return self.squares[name] / self.counts[name]
