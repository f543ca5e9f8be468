"""Weighted k-means of the numbers of each row: codebooks of their own for all rows at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDS = 25  # of Lloyd's algorithm at most


class RowClusters:
    """The numbers of each row in ascending order, with sums of weights up to each.

    Args:
        values: float32 [rows, N].
        weights: of the squared errors, float32 [rows, N], not negative; rows without any count
            all values alike.
    """

    def __init__(self, values: Tensor, weights: Tensor) -> None:
        import torch

        means = weights.double().mean(1, keepdim=True)
        # A little of every value, so that no cluster is without weight.
        share = torch.where(means > 0, weights.double() / means.clamp(min=1e-300) + 1e-6, 1.0)
        ordered = values.double().sort(dim=1, stable=True)
        share = share.gather(1, ordered.indices)
        start = torch.zeros(len(values), 1, dtype=torch.float64)
        self._values = ordered.values
        self._ranks = ordered.indices.argsort(1)
        self._weights = torch.cat([start, share.cumsum(1)], 1)
        self._sums = torch.cat([start, (share * ordered.values).cumsum(1)], 1)

    def fit(self, count: int) -> Tensor:
        """Return entries, float32 [rows, count] in ascending order, that k-means converges to.

        It starts from quantiles of the weights.
        """
        import torch

        at = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        places = torch.searchsorted(self._weights[:, 1:].contiguous(), self._weights[:, -1:] * at)
        entries = self._values.gather(1, places.clamp(max=self._values.shape[1] - 1))
        ends = torch.linspace(0, 1, count, dtype=torch.float64)
        low, high = self._values[:, :1], self._values[:, -1:]
        # Between quantiles and equal distances: tails have few values, and large errors.
        return self._lloyd((entries + low + (high - low) * ends) / 2)

    def split(self, entries: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
        """Return twice as many clusters: each is parted in two, by k-means within it.

        Args:
            entries: float32 [rows, count], ascending; entry i becomes entries 2i and 2i + 1.
            bounds: where the clusters start among the sorted values; see `bounds`.
        """
        import torch

        rows, count = entries.shape
        first, last = bounds[:, :-1], bounds[:, 1:]
        middle = self._mean(first, last, entries.double())
        for _ in range(_ROUNDS):
            cut = torch.searchsorted(self._values, middle.contiguous(), right=True)
            cut = torch.minimum(torch.maximum(cut, first), last)
            low = self._mean(first, cut, entries.double())
            high = self._mean(cut, last, entries.double())
            moved = (low + high) / 2
            if torch.equal(moved, middle):
                break
            middle = moved
        cut = torch.searchsorted(self._values, middle.contiguous(), right=True)
        cut = torch.minimum(torch.maximum(cut, first), last)
        parted = torch.stack([low, high], 2).reshape(rows, 2 * count).float()
        starts = torch.stack([first, cut], 2).reshape(rows, 2 * count)
        return parted, torch.cat([starts, bounds[:, -1:]], 1)

    def codes(self, bounds: Tensor) -> Tensor:
        """Return the cluster of each value, int64 [rows, N]; see `bounds`."""
        import torch

        inner = bounds[:, 1:-1].contiguous()
        return torch.searchsorted(inner, self._ranks.contiguous(), right=True)

    def _lloyd(self, entries: Tensor) -> Tensor:
        import torch

        for _ in range(_ROUNDS):
            bounds = self.bounds(entries)
            moved = self._mean(bounds[:, :-1], bounds[:, 1:], entries)
            if torch.equal(moved, entries):
                break
            entries = moved
        return entries.sort(1).values.float()

    def bounds(self, entries: Tensor) -> Tensor:
        """Return where each cluster starts in the sorted values, and where the last one ends."""
        import torch

        rows, entries = len(entries), entries.double()
        between = ((entries[:, 1:] + entries[:, :-1]) / 2).contiguous()
        inner = torch.searchsorted(self._values, between, right=True)
        start = torch.zeros(rows, 1, dtype=torch.int64)
        return torch.cat([start, inner, torch.full_like(start, self._values.shape[1])], 1)

    def _mean(self, first: Tensor, last: Tensor, otherwise: Tensor) -> Tensor:
        """Return the weighted mean between places; `otherwise` where nothing lies there."""
        import torch

        weights = self._weights.gather(1, last) - self._weights.gather(1, first)
        sums = self._sums.gather(1, last) - self._sums.gather(1, first)
        filled = (last > first) & (weights > 0)
        return torch.where(filled, sums / weights.clamp(min=1e-300), otherwise)


def nearest(values: Tensor, entries: Tensor) -> Tensor:
    """Return which entry of its row is nearest to each value, int64 [rows, N].

    Args:
        values: float32 [rows, N].
        entries: float32 [rows, count], ascending.
    """
    import torch

    between = ((entries[:, 1:] + entries[:, :-1]) / 2).contiguous()
    return torch.searchsorted(between, values.contiguous())
