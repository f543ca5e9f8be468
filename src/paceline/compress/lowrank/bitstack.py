"""BitStack: blocks of signs and low-rank magnitudes, of which as many are loaded as fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.compress.base import Statistic, Statistics, WeightCompressor
from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.registry import Source, check_range, factorizers

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear


@factorizers.register("bitstack", Exactness.LOSSY)
@dataclass(frozen=True)
class BitStack(WeightCompressor):
    """Decompose a matrix into blocks, each about a bit a weight; `--memory` loads what fits.

    A block is the signs of what the blocks before it miss, times the product of low rank that is
    closest to its absolute values. Inputs count by their size on the calibration texts. Every block
    is stored with the error that remains: when a checkpoint is loaded, the blocks of all matrices
    are taken in the order of what they save for each byte.

    Attributes:
        blocks: of a matrix, 1 to 16: the largest size. Default 6.
        rank: of the magnitudes of a block, 1 to 64. Default 4.
    """

    blocks: int = 6
    rank: int = 4

    source = Source(
        authors="Wang et al.",
        title="BitStack: Fine-Grained Size Control for Compressed Large Language Models in "
        "Variable Memory Environments",
        arxiv="2410.23918",
        section="section 2",
        note="blocks are sorted by the error that they remove from the outputs, not by perplexity",
    )
    catalogue = (421,)
    examples = ("bitstack", "bitstack:blocks=3,rank=1")
    statistics = frozenset({Statistic.INPUT_NORM})

    def __post_init__(self) -> None:
        check_range(1, 16, self.name, blocks=self.blocks)
        check_range(1, 64, self.name, rank=self.rank)

    def compress(self, weight: Tensor, stats: Statistics) -> Linear:
        """See `WeightCompressor`."""
        import numpy as np

        from paceline.models.tensors import SignBlocks

        scales = _input_scales(weight, stats)
        rest = weight * scales
        energy = float(rest.double().square().sum())
        signs, lefts, rights, losses = [], [], [], []
        for _ in range(self.blocks):
            left, right = _magnitudes(rest, self.rank, scales)
            plus = rest >= 0
            sizes = (left.float() @ right.float()) * scales
            rest = rest - sizes.where(plus, -sizes)
            signs.append(np.packbits(plus.numpy(), axis=1, bitorder="little"))
            lefts.append(left.numpy())
            rights.append(right.numpy())
            losses.append(float(rest.double().square().sum()) / max(energy, 1e-300))
        falling = np.minimum.accumulate(np.asarray(losses, np.float32))
        return SignBlocks(np.stack(signs), np.stack(lefts), np.stack(rights), falling)


def _input_scales(weight: Tensor, stats: Statistics) -> Tensor:
    """Return the root of the mean square of each input, in units of all inputs', float32 [in].

    An input that is never there has a small share, so that nothing is divided by zero.
    """
    import torch

    squares = stats.mean_squares
    if squares is None:
        return torch.ones(weight.shape[1])
    roots = squares.sqrt()
    roots = roots / roots.mean().clamp(min=1e-30)
    return roots.clamp(min=1e-3)


def _magnitudes(rest: Tensor, rank: int, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return float16 factors [out, rank] and [rank, in] of the absolute values over the scales.

    Both factors have their share of each singular value, as half precision has few exponents.
    """
    import torch

    left, values, right = torch.linalg.svd(rest.abs(), full_matrices=False)
    roots = values[:rank].sqrt()
    factors = (left[:, :rank] * roots).half(), (roots[:, None] * right[:rank] / scales).half()
    if not all(bool(factor.isfinite().all()) for factor in factors):
        raise MethodError("the weights of a matrix are too large for factors in half precision")
    return factors
