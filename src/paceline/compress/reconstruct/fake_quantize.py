"""Rounding to a grid of groups that gradients pass through."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.compress.base import WeightCompressor
from paceline.compress.quantize.base import Quantizer
from paceline.compress.quantize.grids.grid import SMALLEST_SCALE, in_groups
from paceline.compress.reconstruct.objective import round_through
from paceline.errors import MethodError

if TYPE_CHECKING:
    from torch import Tensor


def grid_of(compressor: WeightCompressor, method: str) -> Quantizer:
    """Return the quantizer whose bits and groups a recipe rounds with.

    Raises:
        MethodError: the compressor has no grid of integers in groups.
    """
    quick = compressor.quick
    if not isinstance(quick, Quantizer):
        raise MethodError(
            f"{method} learns through rounding to integers in groups, and {compressor.name} has "
            "none; follow it by a quantizer such as rtn or gptq"
        )
    return quick


def fake_quantize(weight: Tensor, grid: Quantizer) -> Tensor:
    """Return a matrix rounded to nearest, with each group's range as its grid.

    The gradient passes through the rounding of codes and reaches the scales by the extreme weights
    of each group.

    Args:
        weight: float32 [out, in].
        grid: its bits, group and symmetry.
    """
    import torch

    columns = weight.shape[1]
    group = grid.group or columns
    groups = in_groups(weight, group)
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    top, half = 2**grid.bits - 1, 2 ** (grid.bits - 1)
    if grid.symmetric:
        scales = torch.maximum(high / (half - 1), -low / half).clamp(min=SMALLEST_SCALE)
        zeros = torch.full_like(scales, half)
    else:
        scales = ((high - low) / top).clamp(min=SMALLEST_SCALE)
        zeros = (-low / scales).round().detach()
    codes = (round_through(groups / scales) + zeros).clamp(0, top)
    return ((codes - zeros) * scales).reshape(len(weight), -1)[:, :columns]
