"""CompactifAI: matrices as matrix product operators, chains of small tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING

from paceline.compress.base import Statistic, Statistics, WeightCompressor
from paceline.compress.lowrank.base import Curve, Factorizer, store
from paceline.compress.reconstruct.descent import best_parameters
from paceline.core import Exactness
from paceline.registry import Source, check_range, factorizers

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear


@factorizers.register("compactifai", Exactness.LOSSY)
@dataclass(frozen=True)
class CompactifAI(Factorizer):
    """Write a matrix as a matrix product operator, whose bond dimension sets its size.

    Outputs and inputs are split into as many factors as there are sites, and singular value
    decompositions from site to site are cut at the bond dimension. With two sites the budget of
    a block goes to the matrices whose spectrum needs it. A short training of the tensors on
    the outputs for calibration texts heals part of the loss.

    Attributes:
        keep: as of every factorizer; it decides the bond dimension.
        bits: as of every factorizer.
        sites: tensors of a matrix, 2 to 4. Default 2.
        bond: largest bond dimension, 0 to 65536; 0 is what `keep` allows. Default 0.
        steps: of training, 0 to 10000. Default 40.
        rate: of training, in units of the mean absolute number, 0 to 1. Default 0.03.
    """

    sites: int = 2
    bond: int = 0
    steps: int = 40
    rate: float = 0.03

    source = Source(
        authors="Tomut et al.",
        title="CompactifAI: Extreme Compression of Large Language Models using Quantum-Inspired "
        "Tensor Networks",
        arxiv="2401.14109",
        section="section II",
        note="healed matrix by matrix on the outputs for calibration texts, not on the model's",
    )
    catalogue = (170,)
    missing = MappingProxyType(
        {170: "retraining of the whole model, and layers chosen by their sensitivity"}
    )
    examples = ("compactifai", "compactifai:sites=3,bits=8,steps=5")
    statistics = frozenset({Statistic.SECOND_MOMENT})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(2, 4, self.name, sites=self.sites)
        check_range(0, 1 << 16, self.name, bond=self.bond)
        check_range(0, 10_000, self.name, steps=self.steps)
        check_range(0.0, 1.0, self.name, rate=self.rate)

    @property
    def quick(self) -> WeightCompressor:
        """The factors before they are trained."""
        return replace(self, steps=0)

    def curve(self, weight: Tensor, stats: Statistics) -> Curve | None:
        """Return the energy that each bond dimension leaves out; None with more than two sites."""
        import torch

        if self.sites != 2 or self.bond:
            return None
        sites = split_sites(weight.shape, 2)
        energy = torch.linalg.svdvals(_by_sites(weight, sites).flatten(1)).double().square()
        lost = energy.flip(0).cumsum(0).flip(0) / energy.sum().clamp(min=1e-300)
        losses = torch.cat((lost[1:], torch.zeros(1, dtype=torch.float64)))
        bonds = torch.arange(1, len(energy) + 1, dtype=torch.float64)
        numbers = bonds * sum(prod(site) for site in sites)
        sound = numbers < weight.numel()
        whole = torch.tensor([weight.numel()], dtype=torch.float64)
        nothing = torch.zeros(1, dtype=torch.float64)
        return Curve(torch.cat((numbers[sound], whole)), torch.cat((losses[sound], nothing)))

    def compress(self, weight: Tensor, stats: Statistics) -> Linear:
        """See `WeightCompressor`."""
        from paceline.models.tensors import TensorTrain

        if self.keep == 1 and not self.bond:
            return store(weight, self.bits)
        sites = split_sites(weight.shape, self.sites)
        cores = decompose(weight, sites, self.bond or self._bond(sites, weight.numel()))
        cores = self._train(cores, weight, sites, stats)
        outputs, inputs = ([site[side] for site in sites] for side in (0, 1))
        stored = tuple(store(core.contiguous(), self.bits) for core in cores)
        return TensorTrain(stored, tuple(outputs), tuple(inputs))

    def _bond(self, sites: Sequence[tuple[int, int]], numbers: int) -> int:
        """Return the largest bond dimension at which the tensors have the share `keep`."""
        bond, budget = 1, self.keep * numbers + 1e-6
        while _numbers(sites, bond + 1) <= budget:
            bond += 1
            if _numbers(sites, bond) == _numbers(sites, bond + 1):
                break
        return bond

    def _train(
        self,
        cores: list[Tensor],
        weight: Tensor,
        sites: Sequence[tuple[int, int]],
        stats: Statistics,
    ) -> list[Tensor]:
        root, _ = stats.whitener
        target = weight @ root
        energy = target.square().sum().clamp(min=1e-30)

        def loss(parts: list[Tensor]) -> Tensor:
            return (target - contract(parts, sites) @ root).square().sum() / energy

        return best_parameters(cores, loss, self.steps, self.rate)


def split_sites(shape: Sequence[int], sites: int) -> list[tuple[int, int]]:
    """Return outputs and inputs of each site: factors of both sizes that are near to equal."""
    rows, columns = shape
    return list(zip(_factors(rows, sites), _factors(columns, sites)[::-1], strict=True))


def decompose(weight: Tensor, sites: Sequence[tuple[int, int]], bond: int) -> list[Tensor]:
    """Return the tensors of a matrix, each [bond before, outputs * inputs * bond behind].

    Args:
        weight: float32 [out, in].
        sites: outputs and inputs of each.
        bond: largest bond dimension.
    """
    import torch

    rest, before, cores = _by_sites(weight, sites), 1, []
    for outputs, inputs in sites[:-1]:
        matrix = rest.reshape(before * outputs * inputs, -1)
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        rank = min(bond, len(values))
        roots = values[:rank].sqrt()
        cores.append((left[:, :rank] * roots).reshape(before, -1))
        rest, before = roots[:, None] * right[:rank], rank
    return [*cores, rest.reshape(before, -1)]


def contract(cores: Sequence[Tensor], sites: Sequence[tuple[int, int]]) -> Tensor:
    """Return the matrix [out, in] of tensors."""
    rows = cores[0].reshape(-1, len(cores[1]))
    for core, after in zip(cores[1:], [*(len(each) for each in cores[2:]), 1], strict=True):
        rows = (rows @ core).reshape(-1, after)
    count = len(sites)
    by_site = rows.reshape([size for site in sites for size in site])
    order = [*range(0, 2 * count, 2), *range(1, 2 * count, 2)]
    return by_site.permute(order).reshape(prod(site[0] for site in sites), -1)


def _by_sites(weight: Tensor, sites: Sequence[tuple[int, int]]) -> Tensor:
    """Return a matrix with the outputs and inputs of the first site in front, [o1 i1, ...]."""
    count = len(sites)
    split = weight.reshape([site[side] for side in (0, 1) for site in sites])
    order = [axis for site in range(count) for axis in (site, count + site)]
    return split.permute(order).reshape(prod(sites[0]), -1)


def _numbers(sites: Sequence[tuple[int, int]], bond: int) -> int:
    """Return how many numbers the tensors of a bond dimension have."""
    sizes = [prod(site) for site in sites]
    bonds = [1]
    for place in range(1, len(sites)):
        bonds.append(min(bond, bonds[-1] * sizes[place - 1], prod(sizes[place:])))
    bonds.append(1)
    return sum(bonds[at] * size * bonds[at + 1] for at, size in enumerate(sizes))


def _factors(size: int, count: int) -> list[int]:
    """Return as many factors of a number, each as near to a root of what is left as it can be."""
    factors = []
    for left in range(count, 1, -1):
        root = size ** (1 / left)
        best = min(
            (each for each in range(1, size + 1) if size % each == 0),
            key=lambda each: abs(each - root),
        )
        factors.append(best)
        size //= best
    return [*factors, size]
