"""Products of rounded inputs in torch: what integers of few bits would compute."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from paceline.models.tensors import RoundedInputs


def rounded_product(form: RoundedInputs, matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that rounds inputs [..., in] and multiplies them, to [..., out].

    Args:
        form: how inputs are rounded.
        matrix: its values, [out, in].
    """
    apart = torch.zeros(matrix.shape[1], dtype=torch.bool, device=matrix.device)
    apart[torch.tensor(form.apart.tolist(), dtype=torch.int64)] = True

    def multiply(x: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=x.dtype, device=x.device)
        rounded = round_inputs(torch.where(apart, zero, x), form.bits, form.limit)
        if bool(apart.any()):
            rounded = rounded + round_inputs(torch.where(apart, x, zero), form.apart_bits)
        return F.linear(rounded, matrix)

    return multiply


def round_inputs(x: Tensor, bits: int, limit: float | None = None) -> Tensor:
    """Return the inputs [..., in] of each position as whole multiples of a scale; all for 16 bits.

    Codes of so many bits, with a sign: up to `2 ** (bits - 1) - 1` times the scale.

    Args:
        x: the inputs.
        bits: of a code.
        limit: the largest magnitude, beyond which inputs are clipped; each position's own if None.
    """
    if bits == 16:
        return x
    top = 2 ** (bits - 1) - 1
    if limit is not None:
        scale = limit / top
        rounded: Tensor = (x / scale).round().clamp(-top, top) * scale
        return rounded
    scales = x.abs().amax(-1, keepdim=True) / top
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return (x / scales).round() * scales
