"""Integers in groups as parameters: codes, scales and zero points or minima."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from paceline.compress.reconstruct.objective import round_through
from paceline.compress.reconstruct.trainable import Trainable

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.core import Floats
    from paceline.models.tensors import Grouped, Linear

_INSIDE = 0.45  # how far from its code a weight starts at most; at 0.5 it would round to another
_SCALE_SHARE = 0.1  # of the rate, for the logarithm of scales


class TrainedGroups(Trainable):
    """Integers in groups, each code rounded from a position between codes that is trained.

    Args:
        weight: float32 [out, in], what the codes stand for.
        stored: the codes that training starts from.
    """

    def __init__(self, weight: Tensor, stored: Grouped) -> None:
        import torch

        self._stored = stored
        self._at = torch.from_numpy(stored.groups)
        self._top = 2**stored.bits - 1
        self._scales = torch.from_numpy(stored.scales.copy())
        codes = torch.from_numpy(stored.codes.astype("float32"))
        offsets = self._start_offsets()
        scales = torch.where(self._scales == 0, 1.0, self._scales)[:, self._at]
        if stored.minima is None:
            exact = weight / scales + offsets[:, self._at]
        else:
            exact = (weight - offsets[:, self._at]) / scales
        self._codes = (codes + (exact - codes).clamp(-_INSIDE, _INSIDE)).requires_grad_()
        self._logs = torch.zeros_like(self._scales, requires_grad=True)
        # In codes: zero points, or minima relative to the scales.
        self._shifts = torch.zeros_like(self._scales, requires_grad=True)
        self._offsets = offsets

    def groups(self) -> list[tuple[Tensor, float]]:
        """Return codes, scales, and zero points or minima."""
        shifts = [] if self._centred else [(self._shifts, 1.0)]
        return [(self._codes, 1.0), (self._logs, _SCALE_SHARE), *shifts]

    def weight(self) -> Tensor:
        """Return the values of the rounded codes."""
        at = self._at
        codes = round_through(self._codes.clamp(0, self._top))
        scales = self._trained_scales()
        if self._stored.minima is None:
            return (codes - self._zeros()[:, at]) * scales[:, at]
        return codes * scales[:, at] + self._minima()[:, at]

    def stored(self) -> Linear:
        """Return the rounded codes, the scales in their type."""
        import numpy as np
        import torch

        stored = self._stored
        with torch.no_grad():
            codes = self._codes.clamp(0, self._top).round().numpy().astype(np.uint8)
            zeros = None if stored.zeros is None else self._zeros().numpy().astype(np.uint16)
            minima = None if stored.minima is None else self._in_type(self._minima())
            scales = self._in_type(self._trained_scales())
        return replace(stored, codes=codes, scales=scales, zeros=zeros, minima=minima)

    @property
    def _centred(self) -> bool:
        return self._stored.zeros is None and self._stored.minima is None

    def _start_offsets(self) -> Tensor:
        """Return zero points or minima, float32 [out, groups]."""
        import torch

        stored = self._stored
        if stored.minima is not None:
            return torch.from_numpy(stored.minima.copy())
        if stored.zeros is not None:
            return torch.from_numpy(stored.zeros.astype("float32"))
        return torch.full_like(self._scales, 2.0 ** (stored.bits - 1))

    def _trained_scales(self) -> Tensor:
        return self._scales * self._logs.exp()

    def _zeros(self) -> Tensor:
        if self._centred:
            return self._offsets
        return round_through((self._offsets + self._shifts).clamp(0, self._top))

    def _minima(self) -> Tensor:
        return self._offsets + self._shifts * self._scales

    def _in_type(self, values: Tensor) -> Floats:
        """Return scales or minima as the type in which they are saved holds them."""
        return in_type(values, self._stored.scale_type)


def in_type(values: Tensor, kind: str) -> Floats:
    """Round to `F32`, `F16` or `BF16`, and return float32."""
    import torch

    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return values.detach().to(kinds[kind]).float().numpy()
