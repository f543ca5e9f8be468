"""Codes under two-grained scales as parameters: codes, fine and coarse scales, zero points."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from paceline.compress.quantize.grids.grid import SMALLEST_SCALE, half_steps, nearest_levels
from paceline.compress.reconstruct.objective import round_through
from paceline.compress.reconstruct.trainable import Trainable

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear, TwoGrained

_INSIDE = 0.45  # of the way to where a weight would round to another code, at most, at the start
_SCALE_SHARE = 0.1  # of the rate, for the logarithms of scales, coarse and fine


class TrainedTwoGrained(Trainable):
    """Codes that are rounded from trained positions, under fine scales that are rounded, too.

    Positions lie between codes, or between levels where codes stand for a table of them, which
    stays as it is. Groups of zeros stay groups of zeros.

    Args:
        weight: float32 [out, in], what the codes stand for.
        stored: the codes and scales that training starts from.
    """

    def __init__(self, weight: Tensor, stored: TwoGrained) -> None:
        import torch

        self._stored = stored
        self._at = torch.arange(stored.shape[1]) // stored.group
        self._top, self._top_step = 2**stored.bits - 1, 2**stored.step_bits - 1
        self._units = torch.from_numpy(stored.units.copy())[:, None]
        self._steps = torch.from_numpy(stored.steps.astype("float32"))
        half = torch.full_like(self._steps, 2.0 ** (stored.bits - 1))
        if stored.zeros is not None:
            half = torch.from_numpy(stored.zeros.astype("float32"))
        self._zeros = half
        self._levels = self._codes_at = None
        if stored.levels is not None:
            self._levels = torch.from_numpy(stored.levels.astype("float32"))
            self._codes_at = nearest_levels(self._levels)
        self._places = self._start(weight).requires_grad_()
        self._unit_logs = torch.zeros_like(self._units, requires_grad=True)
        self._step_logs = torch.zeros_like(self._steps, requires_grad=True)
        self._shifts = torch.zeros_like(self._steps, requires_grad=True)

    def _start(self, weight: Tensor) -> Tensor:
        """Return the positions of the weights, kept where they round to their codes."""
        import torch

        scales = torch.from_numpy(self._stored.scales)[:, self._at]
        exact = weight / torch.where(scales == 0, 1.0, scales)
        codes = torch.from_numpy(self._stored.codes.astype("int64"))
        if self._levels is None:
            exact = exact + self._zeros[:, self._at]
            return codes + (exact - codes).clamp(-_INSIDE, _INSIDE)
        gaps = self._levels.diff()
        below = torch.cat([gaps[:1], gaps])[codes] * _INSIDE
        above = torch.cat([gaps, gaps[-1:]])[codes] * _INSIDE
        values = self._levels[codes]
        return torch.minimum(torch.maximum(exact, values - below), values + above)

    def groups(self) -> list[tuple[Tensor, float]]:
        """Return positions, both kinds of scales, and zero points where there are some."""
        scales = [(self._unit_logs, _SCALE_SHARE), (self._step_logs, _SCALE_SHARE)]
        spread = 1.0
        if self._levels is not None:  # positions are in levels, which lie farther apart than codes
            spread = max(float(self._levels.diff().mean()), 1.0)
        zeros = [] if self._stored.zeros is None else [(self._shifts, 1.0)]
        return [(self._places, spread), *scales, *zeros]

    def weight(self) -> Tensor:
        """Return the values of the rounded positions under the rounded scales."""
        return self._rounded() * self._scales()[:, self._at]

    def stored(self) -> Linear:
        """Return codes, fine scales and zero points rounded, coarse scales in half precision."""
        import numpy as np
        import torch

        with torch.no_grad():
            zeros = None if self._stored.zeros is None else self._shifted_zeros().numpy()
            return replace(
                self._stored,
                codes=self._codes().numpy().astype(np.uint8),
                steps=self._trained_steps().numpy().astype(np.uint8),
                units=self._trained_units()[:, 0].numpy().copy(),
                zeros=None if zeros is None else zeros.astype(np.uint8),
            )

    def _codes(self) -> Tensor:
        if self._codes_at is not None:
            return self._codes_at[half_steps(self._places)]
        return self._places.clamp(0, self._top).round()

    def _rounded(self) -> Tensor:
        """Return what the codes stand for in units of their scales; gradients pass through."""
        import torch

        if self._levels is not None:
            assert self._codes_at is not None
            places = torch.minimum(torch.maximum(self._places, self._levels[0]), self._levels[-1])
            levels = self._levels[self._codes_at[half_steps(self._places.detach())]]
            return places + (levels - places).detach()
        zeros = self._shifted_zeros()[:, self._at]
        return round_through(self._places.clamp(0, self._top)) - zeros

    def _shifted_zeros(self) -> Tensor:
        if self._stored.zeros is None:
            return self._zeros
        return round_through((self._zeros + self._shifts).clamp(0, self._top))

    def _trained_units(self) -> Tensor:
        units = (self._units * self._unit_logs.exp()).clamp(min=SMALLEST_SCALE)
        return units + (units.half().float() - units).detach()

    def _trained_steps(self) -> Tensor:
        moved = round_through((self._steps * self._step_logs.exp()).clamp(1, self._top_step))
        return moved.where(self._steps > 0, self._steps)

    def _scales(self) -> Tensor:
        """Return the scale of each group as it is stored."""
        scales = self._trained_units() * self._trained_steps()
        return scales + (scales.half().float() - scales).detach()
