"""Codes that are moved one at a time, over scales and entries that are trained."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING

from paceline.compress.reconstruct.grouped import in_type
from paceline.compress.reconstruct.trainable import Trainable

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Codebook, Grouped, Linear

_SCALE_SHARE = 0.1  # of the rate, for the logarithm of scales
_ENTRY_SHARE = 0.1  # of the rate times the entries' size, for entries
_TOGETHER = 1 << 24  # distances to entries that are computed at once


class MovableCodes(Trainable):
    """A stored matrix whose codes change by moves, and whose other numbers by gradients."""

    codes: Tensor  # [out, vectors, tables]; replaced, not written to

    @abstractmethod
    def propose(self, gradient: Tensor, curvature: Tensor, table: int) -> tuple[Tensor, Tensor]:
        """Return the best other value of each code of one table, and what it would change.

        Args:
            gradient: g of the loss by the matrix, float32 [out, in].
            curvature: h, where a change by d of one weight is expected to change the loss by
                g d + h d^2; float32 [out, in].
            table: of the codes.

        Returns:
            codes of the shape of `codes`, and the change of the matrix if all of them moved,
            float32 [out, in].
        """


class MovableGroups(MovableCodes):
    """Integers in groups: a code moves by one, against the gradient."""

    def __init__(self, stored: Grouped) -> None:
        import torch

        self._stored = stored
        self._at = torch.from_numpy(stored.groups)
        self._scales = torch.from_numpy(stored.scales.copy())
        self.codes = torch.from_numpy(stored.codes.astype("float32"))[..., None]
        self._logs = torch.zeros_like(self._scales, requires_grad=True)
        self._minima = None
        if stored.minima is not None:
            self._minima = torch.from_numpy(stored.minima.copy())
            self._shifts = torch.zeros_like(self._minima, requires_grad=True)
        zeros = torch.full((1, 1), 2.0 ** (stored.bits - 1))
        if stored.zeros is not None:
            zeros = torch.from_numpy(stored.zeros.astype("float32"))[:, self._at]
        self._zeros = zeros

    def groups(self) -> list[tuple[Tensor, float]]:
        """Return the scales, and the minima where there are some."""
        shifts = [] if self._minima is None else [(self._shifts, _SCALE_SHARE)]
        return [(self._logs, _SCALE_SHARE), *shifts]

    def weight(self) -> Tensor:
        """Return what the codes stand for under the trained scales."""
        scales = self._scales * self._logs.exp()
        if self._minima is None:
            return (self.codes[..., 0] - self._zeros) * scales[:, self._at]
        minima = self._minima + self._shifts * self._scales
        return self.codes[..., 0] * scales[:, self._at] + minima[:, self._at]

    def propose(self, gradient: Tensor, curvature: Tensor, table: int) -> tuple[Tensor, Tensor]:
        """See `MovableCodes`."""
        scales = (self._scales * self._logs.detach().exp())[:, self._at]
        codes = self.codes[..., 0]
        moved = (codes - (gradient * scales).sign()).clamp(0, 2**self._stored.bits - 1)
        return moved[..., None], (moved - codes) * scales

    def stored(self) -> Linear:
        """Return the codes as they are, the scales in their type."""
        import numpy as np

        kind, minima = self._stored.scale_type, None
        scales = in_type(self._scales * self._logs.exp(), kind)
        if self._minima is not None:
            minima = in_type(self._minima + self._shifts * self._scales, kind)
        codes = self.codes[..., 0].numpy().astype(np.uint8)
        return replace(self._stored, codes=codes, scales=scales, minima=minima)


class MovableEntries(MovableCodes):
    """Codes of a codebook: a code moves to the entry that lies best against the gradient."""

    def __init__(self, stored: Codebook) -> None:
        import torch

        self._stored = stored
        self.codes = torch.from_numpy(stored.codes.astype("int64"))  # [out, vectors, tables]
        start = torch.from_numpy(stored.entries.copy())  # [tables, 1 or out, entries, dim]
        self._start, self._size = start, start.square().mean().sqrt().clamp(min=1e-12)
        self._shifts = torch.zeros_like(start, requires_grad=True)
        self._scales = None
        if stored.scales is not None:
            self._scales = torch.from_numpy(stored.scales.copy())
            self._logs = torch.zeros_like(self._scales, requires_grad=True)

    def groups(self) -> list[tuple[Tensor, float]]:
        """Return the entries, and the scales where there are some."""
        scales = [] if self._scales is None else [(self._logs, _SCALE_SHARE)]
        return [(self._shifts, _ENTRY_SHARE), *scales]

    def weight(self) -> Tensor:
        """Return the sum of the entries that the codes name, times the scales."""
        import torch

        entries = self._entries()
        rows = torch.arange(len(self.codes))[:, None] % entries.shape[1]
        parts = [entries[at, rows, self.codes[:, :, at]] for at in range(len(entries))]
        return torch.stack(parts).sum(0).flatten(1) * self._wide()

    def propose(self, gradient: Tensor, curvature: Tensor, table: int) -> tuple[Tensor, Tensor]:
        """See `MovableCodes`."""
        import torch

        entries, wide = self._entries().detach()[table], self._wide().detach()
        count, dim = entries.shape[1:]
        slopes = (gradient * wide).reshape(len(gradient), -1, dim)
        bends = (curvature * wide.square()).reshape(slopes.shape)
        moved, change = self.codes.clone(), torch.zeros_like(slopes)
        step = max(1, _TOGETHER // (slopes.shape[1] * count * dim))
        for start in range(0, len(slopes), step):
            rows = torch.arange(start, min(start + step, len(slopes)))
            codes = self.codes[rows, :, table]
            book = entries[rows % len(entries), None]  # [rows, 1, count, dim]
            book = book.expand(-1, codes.shape[1], -1, -1)
            now = book.gather(2, codes[..., None, None].expand(*codes.shape, 1, dim))
            ways = book - now  # [rows, vectors, count, dim]
            worse = (ways * (slopes[rows, :, None] + bends[rows, :, None] * ways)).sum(-1)
            worse = worse.scatter(2, codes[..., None], torch.inf)  # another one than now
            best = worse.argmin(-1)
            moved[rows, :, table] = best
            index = best[..., None, None].expand(*best.shape, 1, dim)
            change[rows] = ways.gather(2, index)[:, :, 0]
        return moved, change.reshape(gradient.shape) * wide

    def stored(self) -> Linear:
        """Return the codes as they are, with the trained entries and scales."""
        import numpy as np

        scales = None
        if self._scales is not None:
            scales = in_type(self._scales * self._logs.exp(), self._stored.float_type)
        entries = in_type(self._entries(), self._stored.float_type)
        codes = self.codes.numpy().astype(np.uint16)
        return replace(self._stored, codes=codes, entries=entries, scales=scales)

    def _entries(self) -> Tensor:
        return self._start + self._shifts * self._size

    def _wide(self) -> Tensor:
        """Return the scale of each weight, float32 [out, in] or [1, 1]."""
        import torch

        if self._scales is None:
            return torch.ones(1, 1)
        columns = torch.arange(self._stored.shape[1]) // self._stored.group
        return (self._scales * self._logs.exp())[:, columns]


def choose_moves(
    change: Tensor, gradient: Tensor, rows: Tensor, moment: Tensor, vectors: int, count: int
) -> Tensor:
    """Return which proposed moves lower the loss most, one code of each row after another.

    The loss is taken as quadratic: the curvature between two weights of a row is the row's
    sensitivity times the second moment of their inputs, so that a move changes what the others of
    its row gain.

    Args:
        change: of the matrix if all codes moved, float32 [out, in].
        gradient: of the loss, float32 [out, in].
        rows: sensitivity of each row, float32 [out].
        moment: mean of x x' of the inputs, float32 [in, in].
        vectors: codes of a row.
        count: of each row that may move at most.

    Returns:
        bool [out, vectors].
    """
    import torch

    size = change.shape[1] // vectors
    slope = gradient.clone()
    chosen = torch.zeros(len(change), vectors, dtype=torch.bool)
    at = torch.arange(len(change))
    bend = rows[:, None] * moment.diagonal() * change.square()
    for _ in range(count):
        gain = -(slope * change + bend).reshape(len(change), vectors, size).sum(-1)
        gain = gain.masked_fill(chosen, -torch.inf)
        best = gain.argmax(1)
        good = gain[at, best] > 0
        if not bool(good.any()):
            break
        chosen[at[good], best[good]] = True
        for offset in range(size):
            inputs = best * size + offset
            moved = torch.where(good, change[at, inputs] * rows, 0.0)
            slope += 2 * moved[:, None] * moment[inputs]
    return chosen


def movable(stored: Linear) -> MovableCodes | None:
    """Return the codes of a matrix as something that moves; None where it has none."""
    from paceline.models.tensors import Codebook, Grouped

    if isinstance(stored, Grouped):
        return MovableGroups(stored)
    return MovableEntries(stored) if isinstance(stored, Codebook) else None
