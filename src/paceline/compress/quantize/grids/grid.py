"""The values that the groups of a matrix can take: rounding to them, and their stored form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from paceline.errors import MethodError

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear

TOP_LEVEL = 127  # tables of levels reach from -127 to 127
SMALLEST_SCALE = 2.0**-24  # above zero in half precision


@dataclass(frozen=True)
class Grid:
    """A grid for each group: `(code - zero) * scale`, or `levels[code] * scale`.

    Codes go from 0 to 2**bits - 1.

    Attributes:
        bits: of a code.
        group: inputs that share a scale.
        scales: float32 [out, groups].
        zeros: float32 [out, groups], whole numbers; not looked at where there are levels.
        levels: float32 [2**bits], whole numbers in ascending order; or None.
        units: float32 [out] where scales are whole multiples of a number for each row, `steps`
            of them, rounded to half precision; or None.
        steps: float32 [out, groups], or None.
        step_bits: of a step.
    """

    bits: int
    group: int
    scales: Tensor
    zeros: Tensor
    levels: Tensor | None = None
    units: Tensor | None = None
    steps: Tensor | None = None
    step_bits: int = 0

    def round(self, weight: Tensor) -> Tensor:
        """Return the codes, float32 [out, in], nearest to a matrix [out, in]."""
        scales, zeros = self._wide(weight.shape[1])
        if self.levels is None:
            return (weight / scales).round().add(zeros).clamp(0, 2**self.bits - 1)
        return nearest_levels(self.levels)[half_steps(weight / scales)].float()

    def values(self, codes: Tensor) -> Tensor:
        """Return what codes [out, in] stand for, float32."""
        scales, zeros = self._wide(codes.shape[1])
        return self.places(codes, zeros) * scales

    def places(self, codes: Tensor, zeros: Tensor) -> Tensor:
        """Return what codes stand for before they are scaled, given zeros of the same shape."""
        return codes - zeros if self.levels is None else self.levels[codes.long()]

    def pack(self, codes: Tensor) -> Linear:
        """Return the stored form of codes [out, in].

        Raises:
            MethodError: scales are too large for half precision.
        """
        if not bool(self.scales.isfinite().all()):
            raise MethodError("the weights of a matrix are too large for scales in half precision")
        grid = self if self.levels is None else self._with_zeros()
        if grid.steps is not None:
            return grid._pack_two_grained(codes)
        return grid._pack_grouped(codes) if self.levels is None else grid._pack_levels(codes)

    def _with_zeros(self) -> Grid:
        """Return the grid with scales of zero where all is zero: tables may have no zero."""
        import torch

        empty = self.scales <= SMALLEST_SCALE
        none = torch.zeros_like(self.scales)
        steps = None if self.steps is None else torch.where(empty, none, self.steps)
        return replace(self, scales=torch.where(empty, none, self.scales), steps=steps)

    def _pack_grouped(self, codes: Tensor) -> Linear:
        import numpy as np

        from paceline.models.tensors import Grouped

        zeros = None
        if bool((self.zeros != 2 ** (self.bits - 1)).any()):
            zeros = self.zeros.numpy().astype(np.uint16)
        integers = codes.numpy().astype(np.uint8)
        scales = np.ascontiguousarray(self.scales.numpy())
        return Grouped(self.bits, integers, scales, self.group, zeros, scale_type="F16")

    def _pack_two_grained(self, codes: Tensor) -> Linear:
        import numpy as np

        from paceline.models.tensors import TwoGrained

        assert self.units is not None
        assert self.steps is not None
        zeros = levels = None
        if self.levels is not None:
            levels = self.levels.numpy().astype(np.int8)
        elif bool((self.zeros != 2 ** (self.bits - 1)).any()):
            zeros = self.zeros.numpy().astype(np.uint8)
        return TwoGrained(
            self.bits,
            codes.numpy().astype(np.uint8),
            self.group,
            self.steps.numpy().astype(np.uint8),
            self.step_bits,
            np.ascontiguousarray(self.units.numpy()),
            zeros,
            levels,
        )

    def _pack_levels(self, codes: Tensor) -> Linear:
        import numpy as np

        from paceline.models.tensors import Codebook

        assert self.levels is not None
        entries = self.levels.numpy().astype(np.float32).reshape(1, 1, -1, 1)
        integers = codes.numpy().astype(np.uint16)[..., None]
        scales = np.ascontiguousarray(self.scales.numpy())
        return Codebook(integers, entries, scales, self.group, float_type="F16")

    def column(self, at: int) -> Grid:
        """Return the grid of one column, for rounding."""
        place = at // self.group
        part = slice(place, place + 1)
        return replace(self, scales=self.scales[:, part], zeros=self.zeros[:, part])

    def _wide(self, columns: int) -> tuple[Tensor, Tensor]:
        if self.scales.shape[1] == 1:
            return self.scales, self.zeros
        return (
            self.scales.repeat_interleave(self.group, 1)[:, :columns],
            self.zeros.repeat_interleave(self.group, 1)[:, :columns],
        )


def in_groups(values: Tensor, group: int) -> Tensor:
    """Return rows [out, in] as groups, [out, groups, group]; zeros fill the last one."""
    from torch.nn import functional as F

    padded = F.pad(values, (0, -values.shape[1] % group))
    return padded.reshape(len(values), -1, group)


def half_steps(values: Tensor) -> Tensor:
    """Return the place of each value in tables of half whole numbers from -127 to 127."""
    return (values * 2).floor().clamp(-2 * TOP_LEVEL, 2 * TOP_LEVEL).int() + 2 * TOP_LEVEL


def nearest_levels(levels: Tensor) -> Tensor:
    """Return the code of the level that is nearest to each half whole number, for `half_steps`.

    Where two are as near it is the upper one: boundaries between whole numbers lie on the table.
    """
    import torch

    at = torch.arange(-2 * TOP_LEVEL, 2 * TOP_LEVEL + 1) / 2
    return torch.bucketize(at, (levels[1:] + levels[:-1]) / 2, right=True)


def join(grids: Sequence[Grid], group: int) -> Grid:
    """Return one grid of all groups, from grids of one group each, in order."""
    import torch

    def joined(parts: list[Tensor | None]) -> Tensor | None:
        tensors = [part for part in parts if part is not None]
        return torch.cat(tensors, 1) if tensors else None

    return replace(
        grids[0],
        group=group,
        scales=torch.cat([grid.scales for grid in grids], 1),
        zeros=torch.cat([grid.zeros for grid in grids], 1),
        steps=joined([grid.steps for grid in grids]),
    )
