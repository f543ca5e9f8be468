"""LRQ: learn how to round by a low-rank matrix that scales the weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from paceline.compress.reconstruct.grouped import TrainedGroups
from paceline.compress.reconstruct.objective import round_through
from paceline.compress.tune.base import Tuner
from paceline.core import Exactness
from paceline.registry import Source, check_range, tuners

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Grouped, Linear


@tuners.register("lrq", Exactness.LOSSY)
@dataclass(frozen=True)
class LRQ(Tuner):
    """Divide the weights by exp(L U + r + c) before they are rounded, with low-rank L U.

    Each weight has a scale of its own, and all of a matrix have few parameters, so that little is
    learnt by heart. L, U, a number for each row, one for each column, and the scales of groups are
    trained; zero points stay. Training starts at the codes of the quantizer.

    Attributes:
        steps: as of every tuner.
        rate: as of every tuner; of the factors and the numbers of rows and columns.
        batch: as of every tuner.
        rank: of L U, 1 to 4096. Default 16.
    """

    rank: int = 16

    source = Source(
        authors="Lee et al.",
        title="LRQ: Optimizing Post-Training Quantization for Large Language Models by Learning "
        "Low-Rank Weight-Scaling Matrices",
        arxiv="2407.11534",
        section="section 2.3, equation 2",
        note="weights only, in groups; the norms of the block are trained, too",
    )
    catalogue = (282,)
    missing = MappingProxyType({282: "activations of 8 bits while the rounding is learned"})
    examples = ("lrq:steps=8",)

    trains = "integers in groups with zero points"

    def __post_init__(self) -> None:
        Tuner.__post_init__(self)
        check_range(1, 4096, self.name, rank=self.rank)

    def trainable(self, weight: Tensor, stored: Linear) -> ScaledRounding | None:
        """Return the scaling of integers in groups."""
        from paceline.models.tensors import Grouped

        if not isinstance(stored, Grouped) or stored.minima is not None:
            return None
        return ScaledRounding(weight, stored, self.rank)


class ScaledRounding(TrainedGroups):
    """Integers in groups, rounded from weights that low-rank scales divide."""

    def __init__(self, weight: Tensor, stored: Grouped, rank: int) -> None:
        import torch

        super().__init__(weight, stored)
        rows, columns = weight.shape
        generator = torch.Generator().manual_seed(rows * 1_000_003 + columns)
        right = torch.randn(min(rank, *weight.shape), columns, generator=generator)
        self._left = torch.zeros(rows, len(right), requires_grad=True)
        self._right = (right / len(right) ** 0.5).requires_grad_()
        self._row = torch.zeros(rows, 1, requires_grad=True)
        self._column = torch.zeros(1, columns, requires_grad=True)
        self._steps = self._codes.detach() - self._offsets[:, self._at]  # away from zero

    def groups(self) -> list[tuple[Tensor, float]]:
        """Return the factors, the numbers of rows and columns, and the scales of groups."""
        scaling = (self._left, self._right, self._row, self._column)
        return [*((each, 1.0) for each in scaling), (self._logs, 0.1)]

    def weight(self) -> Tensor:
        """Return the values of the codes that the scaled weights round to."""
        at = self._at
        zeros = self._offsets[:, at]
        codes = round_through((self._scaled() + zeros).clamp(0, self._top))
        return (codes - zeros) * self._trained_scales()[:, at]

    def stored(self) -> Linear:
        """Return the codes that the scaled weights round to."""
        import numpy as np
        import torch

        with torch.no_grad():
            codes = (self._scaled() + self._offsets[:, self._at]).clamp(0, self._top).round()
        scales = self._in_type(self._trained_scales())
        return replace(self._stored, codes=codes.numpy().astype(np.uint8), scales=scales)

    def _scaled(self) -> Tensor:
        logs = self._left @ self._right + self._row + self._column
        scaled: Tensor = self._steps * (-logs).exp()
        return scaled
