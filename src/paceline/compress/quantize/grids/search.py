"""Choose grids: for each group the scale and zero point with the smallest weighted error."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from paceline.compress.quantize.grids.grid import (
    SMALLEST_SCALE,
    TOP_LEVEL,
    Grid,
    half_steps,
    in_groups,
    nearest_levels,
)

if TYPE_CHECKING:
    from torch import Tensor

_NARROWEST = 0.6  # share of a range that the narrowest grid leaves out
_ROWS, _ROUNDS = 256, 6  # that learned tables look at
_LARGEST = 65504.0  # the largest number of half precision


@dataclass(frozen=True)
class GridSearch:
    """Chooses the grids of groups.

    Attributes:
        bits: of a code.
        symmetric: zero points stay in the middle.
        search: narrower grids that are tried for each group.
        levels: float32 [2**bits], what codes stand for before they are scaled; or None for
            whole numbers.
        step_bits: bits of a fine scale; 0 where scales are of half precision.
        units: float32 [out], coarse scales; None where there are no fine ones, or not yet.
    """

    bits: int
    symmetric: bool
    search: int
    levels: Tensor | None = None
    step_bits: int = 0
    units: Tensor | None = None

    def grid(self, weight: Tensor, group: int, importance: Tensor | None = None) -> Grid:
        """Return a grid for each group of a matrix.

        Args:
            weight: float32 [out, in].
            group: inputs that share a scale.
            importance: weights of the squared errors, float32 [in] or [out, in]; all alike by
                default.
        """
        import torch

        columns = weight.shape[1]
        share = torch.ones(1, columns) if importance is None else importance.reshape(-1, columns)
        groups, shares = in_groups(weight, group), in_groups(share, group)
        best = _Candidates(self, groups, shares, group)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        for step in range(self.search + 1):
            factor = 1 - _NARROWEST * step / max(self.search, 1)
            best.offer(*self._span(low * factor, high * factor))
        if self.search:
            best.fit()
        if self.units is not None:
            best.step(self.units, 2**self.step_bits - 1)
        return best.grid

    def with_units(
        self, weight: Tensor, group: int, importance: Tensor | None = None
    ) -> GridSearch:
        """Return the search with coarse scales that reach the largest scale of each row."""
        if not self.step_bits:
            return self
        scales = replace(self, units=None).grid(weight, group, importance).scales
        units = scales.amax(1) / (2**self.step_bits - 1)
        return replace(self, units=_half(units))

    def _span(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return scales and zero points of grids that span ranges [out, groups]."""
        import torch

        top, half = 2**self.bits - 1, 2 ** (self.bits - 1)
        if self.levels is not None:
            ends = torch.maximum(high / self.levels[-1], low / self.levels[0])
            return _half(ends), torch.full_like(ends, half)
        if self.symmetric:
            scales = _half(torch.maximum(high / (half - 1), -low / half))
            return scales, torch.full_like(scales, half)
        scales = _half((high - low) / top)
        return scales, (-low / scales).round().clamp(0, top)


class _Candidates:
    """The best grid so far of each group.

    Args:
        search: what is looked for.
        groups: float32 [out, groups, group], weights.
        shares: of the squared errors, [1 or out, groups, group].
        group: inputs that share a scale.
    """

    def __init__(self, search: GridSearch, groups: Tensor, shares: Tensor, group: int) -> None:
        self._search, self._groups, self._shares, self._group = search, groups, shares, group
        levels = search.levels
        self._nearest = None if levels is None else levels[nearest_levels(levels)]
        self._scales: Tensor | None = None
        self._zeros: Tensor | None = None
        self._errors: Tensor | None = None
        self._steps: Tensor | None = None
        self._units: Tensor | None = None

    @property
    def grid(self) -> Grid:
        """The best grid of each group."""
        assert self._scales is not None
        assert self._zeros is not None
        return self._as_grid(self._scales, self._zeros)

    def _as_grid(self, scales: Tensor, zeros: Tensor) -> Grid:
        search = self._search
        bits = search.step_bits if self._units is not None else 0
        return Grid(
            search.bits,
            self._group,
            scales,
            zeros,
            search.levels,
            self._units,
            self._steps,
            bits,
        )

    def offer(self, scales: Tensor, zeros: Tensor) -> Tensor:
        """Keep grids where they have less error; return where that is, bool [out, groups]."""
        import torch

        errors = self._error(scales, zeros)
        if self._scales is None or self._zeros is None or self._errors is None:
            self._scales, self._zeros, self._errors = scales, zeros, errors
            return torch.ones_like(errors, dtype=torch.bool)
        better = errors < self._errors
        self._errors = torch.where(better, errors, self._errors)
        self._scales = torch.where(better, scales, self._scales)
        self._zeros = torch.where(better, zeros, self._zeros)
        return better

    def fit(self, rounds: int = 2) -> None:
        """Offer the scales with the least squared error for the codes, and neighbouring zeros."""
        for _ in range(rounds):
            scales, zeros = self.grid.scales, self.grid.zeros
            places = self._places(scales, zeros)
            weighted = places * self._shares
            sizes = (weighted * places).sum(-1)
            fitted = (weighted * self._groups).sum(-1) / sizes.clamp(min=1e-30)
            self.offer(_half(fitted.clamp(max=_LARGEST)), zeros)
            if not self._search.symmetric and self._search.levels is None:
                for shift in (-1, 1):
                    self.offer(self.grid.scales, (zeros + shift).clamp(0, 2**self._search.bits - 1))

    def step(self, units: Tensor, top: int) -> None:
        """Choose fine scales: the whole numbers up to `top` of `units` with the least error."""
        import torch

        scales, zeros = self.grid.scales, self.grid.zeros
        middle = (scales / units[:, None]).round()
        self._scales = self._zeros = self._errors = None
        last = 2**self._search.bits - 1
        moves = [0] if self._search.symmetric or self._search.levels is not None else [0, -1, 1]
        steps = torch.zeros_like(scales)
        for shift in (0, -1, 1):
            tried = (middle + shift).clamp(1, top)
            for move in moves:
                better = self.offer(
                    (units[:, None] * tried).half().float(), (zeros + move).clamp(0, last)
                )
                steps = torch.where(better, tried, steps)
        self._steps, self._units = steps, units

    def _places(self, scales: Tensor, zeros: Tensor) -> Tensor:
        ratio = self._groups / scales[..., None]
        if self._nearest is None:
            top = 2**self._search.bits - 1
            wide = zeros[..., None]
            return (ratio.round() + wide).clamp(0, top) - wide
        return self._nearest[half_steps(ratio)]

    def _error(self, scales: Tensor, zeros: Tensor) -> Tensor:
        lost = self._places(scales, zeros) * scales[..., None] - self._groups
        return (lost.square() * self._shares).sum(-1)


def _half(scales: Tensor) -> Tensor:
    """Return scales as half precision holds them, above zero."""
    import torch

    scales = scales.half().float()  # beyond its range: checked when it is packed
    return torch.where(scales > 0, scales, torch.full_like(scales, SMALLEST_SCALE))


def learned_levels(
    weight: Tensor, search: GridSearch, group: int, importance: Tensor | None = None
) -> Tensor:
    """Return the table of levels with the least error that alternating steps find.

    Scales are searched for a table, and each level then moves to the mean of the weights that are
    nearest to it, both weighted by importance and scale (Lloyd's algorithm). A few hundred rows of
    the matrix are looked at.

    Args:
        weight: float32 [out, in].
        search: bits, and how scales are searched; without levels and fine scales.
        group: inputs that share a scale.
        importance: float32 [in] or [out, in].
    """
    import torch

    stride = -(-len(weight) // _ROWS)
    rows = weight[::stride]
    share = torch.ones(1, weight.shape[1]) if importance is None else importance
    share = share.reshape(-1, weight.shape[1])
    share = share[::stride] if len(share) > 1 else share
    spread = torch.linspace(-1, 1, 2**search.bits)
    levels = spread.sign() * spread.abs() ** 1.3 * TOP_LEVEL
    for _ in range(_ROUNDS):
        tried = replace(search, levels=levels, symmetric=True, search=min(search.search, 10))
        grid = tried.grid(rows, group, share)
        codes = grid.round(rows).long().flatten()
        scales = grid.scales.repeat_interleave(group, 1)[:, : rows.shape[1]]
        weights = (share * scales.square()).flatten().double()
        total = torch.bincount(codes, weights, minlength=len(levels))
        sums = torch.bincount(
            codes, weights * (rows / scales).flatten().double(), minlength=len(levels)
        )
        moved = torch.where(total > 0, sums / total.clamp(min=1e-300), levels.double()).float()
        levels = moved * (TOP_LEVEL / moved.abs().max().clamp(min=1e-30))
    return whole_levels(levels)


def whole_levels(levels: Tensor) -> Tensor:
    """Return levels as ascending whole numbers, no two alike."""
    import torch

    ordered = levels.sort().values.round()
    up = torch.arange(len(ordered), dtype=torch.float32)
    last = TOP_LEVEL - len(ordered) + 1  # the others above the first have room up to there
    return (ordered - up).cummax(0).values.clamp(-TOP_LEVEL, last) + up
