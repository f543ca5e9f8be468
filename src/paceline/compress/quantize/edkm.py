"""eDKM: cluster weights by differentiable k-means, on a table of their distinct values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from paceline.compress.base import Statistic, Statistics, WeightCompressor
from paceline.compress.quantize.base import check_finite
from paceline.compress.quantize.grids.grid import SMALLEST_SCALE, in_groups
from paceline.compress.reconstruct.descent import Descent
from paceline.core import Exactness
from paceline.registry import Source, check_range, quantizers

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear

_ROUNDS = 3  # of soft k-means in a step; each begins at the centroids of the step before
_WARM, _COLD = 0.3, 0.01  # temperature at the first and the last step, of the squared spacing
_HALVES = 1 << 16  # numbers of half precision


@quantizers.register("edkm", Exactness.LOSSY)
@dataclass(frozen=True)
class EDKM(WeightCompressor):
    """Store each weight as one of a few values that the matrix shares, times a scale of its group.

    Weights are trained on the outputs of the matrix while each is drawn softly to all centroids;
    attention to them falls off with the squared distance, and is sharpened step by step. Distances
    and attention are computed for distinct values in half precision, at most 65,536 of them, and
    looked up for the weights, so that training keeps a table and an index and no map of all weights
    to all centroids.

    Attributes:
        bits: of a code, 1 to 8; there are 2 ** bits values. Default 4.
        group: inputs that share a scale; 0 is the whole row. Default 128.
        steps: of Adam for each matrix, 0 to 100000; 0 is plain k-means. Default 40.
        rate: learning rate, in standard deviations of the weights, above 0 and up to 1. Default
            0.05.
    """

    bits: int = 4
    group: int = 128
    steps: int = 40
    rate: float = 0.05

    source = Source(
        authors="Cho et al.",
        title="eDKM: An Efficient and Accurate Train-time Weight Clustering for Large Language "
        "Models",
        arxiv="2309.00964",
        section="sections 2.1 (DKM), 2.3 (uniquification)",
        note="trained matrix by matrix on its outputs; scales of groups besides the values",
    )
    catalogue = (201,)
    missing = MappingProxyType({201: "sharding among learners: there is one process"})
    examples = ("edkm:bits=3,group=32,steps=10",)
    statistics = frozenset({Statistic.SECOND_MOMENT})

    def __post_init__(self) -> None:
        check_range(1, 8, self.name, bits=self.bits)
        check_range(0, 1 << 20, self.name, group=self.group)
        check_range(0, 100_000, self.name, steps=self.steps)
        check_range(1e-9, 1.0, self.name, rate=self.rate)

    @property
    def quick(self) -> WeightCompressor:
        """Plain k-means."""
        return replace(self, steps=0)

    def compress(self, weight: Tensor, stats: Statistics) -> Linear:
        """Return a codebook of one table, with scales."""
        import torch

        assert stats.second_moment is not None
        check_finite(weight, self.name)
        group = self.group or weight.shape[1]
        sizes = _group_sizes(weight, group).half().float()
        scales = sizes.clamp(min=SMALLEST_SCALE)
        wide = scales.repeat_interleave(group, 1)[:, : weight.shape[1]]
        moment = stats.second_moment / stats.second_moment.diagonal().mean().clamp(min=1e-12)

        def error(values: Tensor) -> Tensor:
            lost = values * wide - weight
            return ((lost @ moment) * lost).mean()

        start = (weight / wide).contiguous()
        centroids = plain_centroids(start, 2**self.bits).half().float()
        best = (nearest(start, centroids), centroids)
        if self.steps and bool(centroids.max() > centroids.min()):
            with torch.enable_grad():
                trained, found = self._train(start, centroids, error)
            found = found.detach().half().float()
            codes = nearest(trained, found)
            if error(found[codes]) < error(centroids[best[0]]):
                best = (codes, found)
        return _stored(*best, sizes, group)  # groups of zeros have the size zero

    def _train(
        self, start: Tensor, centroids: Tensor, error: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return weights and centroids after the training."""
        values = start.clone().requires_grad_()
        descent = Descent([(values, 1.0)], self.steps, self.rate)
        spacing = float(centroids.max() - centroids.min()) / len(centroids)
        for step in range(self.steps):
            done = step / max(self.steps - 1, 1)
            temperature = _WARM ** (1 - done) * _COLD**done * spacing**2
            table = Table.of(values)
            centroids = table.centroids(centroids, temperature)
            descent.step(error(table.soft(values, centroids, temperature)))
            centroids = centroids.detach()
        return values.detach(), centroids


class Table(NamedTuple):
    """Distinct values of a matrix in half precision.

    Attributes:
        values: the mean of the weights that are rounded to each, float32 [distinct].
        sizes: how many these are, float32 [distinct].
        places: of each weight in the table, int32 [weights].
    """

    values: Tensor
    sizes: Tensor
    places: Tensor

    @classmethod
    def of(cls, weights: Tensor) -> Table:
        """Return the table of a matrix; gradients of `values` reach the weights."""
        import torch

        flat = weights.flatten()
        bits = flat.detach().half().view(torch.int16).int() + _HALVES // 2
        counts = torch.bincount(bits, minlength=_HALVES)
        there = counts > 0
        places = (there.cumsum(0, dtype=torch.int32) - 1)[bits]
        counts = counts[there].float()
        sums = torch.zeros(len(counts)).index_add(0, places, flat)
        return cls(sums / counts, counts, places)

    def centroids(self, start: Tensor, temperature: float) -> Tensor:
        """Return the centroids after some rounds of soft k-means, differentiable."""
        centroids = start
        for _ in range(_ROUNDS):
            shares = _attention(self.values, centroids, temperature) * self.sizes[:, None]
            sums = shares.sum(0)
            moved = (shares * self.values[:, None]).sum(0) / sums.clamp(min=1e-6)
            centroids = moved.where(sums > 1e-6, centroids)
        return centroids

    def soft(self, weights: Tensor, centroids: Tensor, temperature: float) -> Tensor:
        """Return for each weight the mean of the centroids by its attention, differentiable.

        By the weight the derivative of the mean is twice the variance of the centroids under the
        attention, over the temperature.
        """
        shares = _attention(self.values.detach(), centroids, temperature)
        means = shares @ centroids
        slopes = (2 / temperature) * (shares @ centroids.square() - means.square()).detach()
        flat = weights.flatten()
        moved = slopes[self.places] * (flat - flat.detach())
        return (means.index_select(0, self.places) + moved).reshape(weights.shape)


def plain_centroids(values: Tensor, count: int, rounds: int = 20) -> Tensor:
    """Return the centroids of k-means on the numbers of a matrix, from quantiles on."""
    import torch

    table = Table.of(values)
    order = table.values.argsort()
    sorted_values, counts = table.values[order], table.sizes[order]
    shares = counts.cumsum(0) / counts.sum()
    wanted = (torch.arange(count) + 0.5) / count
    at = torch.searchsorted(shares, wanted).clamp(max=len(shares) - 1)
    centroids = sorted_values[at]
    for _ in range(rounds):
        codes = nearest(sorted_values, centroids)
        sums = torch.zeros(count).index_add(0, codes, counts)
        moved = torch.zeros(count).index_add(0, codes, counts * sorted_values)
        centroids = (moved / sums.clamp(min=1)).where(sums > 0, centroids)
    return centroids


def nearest(values: Tensor, centroids: Tensor) -> Tensor:
    """Return the index of the nearest centroid to each of some values, of the same shape."""
    import torch

    order = centroids.argsort()
    ranked = centroids[order]
    middles = (ranked[1:] + ranked[:-1]) / 2
    return order[torch.searchsorted(middles, values.contiguous())]


def _attention(values: Tensor, centroids: Tensor, temperature: float) -> Tensor:
    """Return the share of each centroid for each value, [values, centroids]."""
    return (-(values[:, None] - centroids).square() / temperature).softmax(-1)


def _group_sizes(weight: Tensor, group: int) -> Tensor:
    """Return the root mean square of each group, float32 [out, groups]."""
    squares = in_groups(weight.square(), group).sum(-1)
    counts = in_groups(weight.new_ones(1, weight.shape[1]), group).sum(-1)
    return (squares / counts).sqrt()


def _stored(codes: Tensor, centroids: Tensor, scales: Tensor, group: int) -> Linear:
    import numpy as np

    from paceline.models.tensors import Codebook

    entries = centroids.reshape(1, 1, -1, 1).numpy()
    return Codebook(
        codes[..., None].numpy().astype(np.uint16), entries, scales.numpy(), group, "F16"
    )
