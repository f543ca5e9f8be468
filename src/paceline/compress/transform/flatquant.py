"""FlatQuant: learn an invertible transform of the inputs under which weights round better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from paceline.compress.base import GROUPS, Block, BlockTransform, WeightCompressor
from paceline.compress.kronecker import Kronecker
from paceline.compress.reconstruct.fake_quantize import fake_quantize, grid_of
from paceline.compress.reconstruct.objective import Objective, train
from paceline.compress.transform.base import ChannelScales
from paceline.core import Exactness
from paceline.registry import Source, check_range, transforms

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.compress.quantize.base import Quantizer

_FACTOR_SHARE = 0.1  # of the rate, for entries of the factors


@transforms.register("flatquant", Exactness.LOSSY)
@dataclass(frozen=True)
class FlatQuant(BlockTransform):
    """Transform the inputs of each group of matrices by a Kronecker product that is trained.

    The matrices with one input, such as q, k and v, share two small square factors, which begin as
    identities and are trained with the scales of channels on the outputs of the block. Matrices are
    stored as they multiply the transformed inputs, with the factors beside them; scales are folded
    into what comes before. One in eight texts is not trained on; where the error on those does not
    fall, the block stays as it was.

    Attributes:
        steps: of Adam for each block, 1 to 100000. Default 48.
        rate: learning rate of the logarithms of scales, and ten times that of the factors, above
            0 and up to 1. Default 0.02.
        batch: texts of a step, 1 to 1024. Default 2.
    """

    steps: int = 48
    rate: float = 0.02
    batch: int = 2

    source = Source(
        authors="Sun et al.",
        title="FlatQuant: Flatness Matters for LLM Quantization",
        arxiv="2410.09426",
        section="section 3.1, equations 3 and 4",
        note="weights only: activations are not rounded while it is trained",
    )
    catalogue = (240,)
    missing = MappingProxyType(
        {240: "activations and keys in 4 bits; one kernel for the transform"}
    )
    examples = ("flatquant:steps=8",)
    of_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range(1, 100_000, self.name, steps=self.steps)
        check_range(1e-9, 1.0, self.name, rate=self.rate)
        check_range(1, 1024, self.name, batch=self.batch)

    def transform(self, block: Block, compressor: WeightCompressor) -> None:
        """Scale the channels, and add the transforms to `block.bases`."""
        import torch

        grid = grid_of(compressor, self.name)
        objective = Objective(block, self.batch)
        scales, bases = ChannelScales(block), _identities(block)
        before = objective.error(_rounded(block.weights, bases, grid))
        factors = {id(each): each for basis in bases.values() for each in (basis.left, basis.right)}
        parameters = [(each.requires_grad_(), _FACTOR_SHARE) for each in factors.values()]
        parameters += [(log, 1.0) for log in scales.logs]
        train(
            objective,
            lambda: _rounded(scales.weights(), bases, grid),
            parameters,
            self.steps,
            self.rate,
        )
        with torch.no_grad():
            weights = scales.weights()
            bases = {name: basis.halved() for name, basis in bases.items()}
            if objective.error(_rounded(weights, bases, grid)) < before:
                block.weights.update(weights)
                block.bases.update(bases)


def _identities(block: Block) -> dict[str, Kronecker]:
    """Return a transform for each group of matrices that does nothing yet."""
    import torch

    bases: dict[str, Kronecker] = {}
    for group in GROUPS:
        names = [name for name in group if name in block.weights]
        if names:
            width = block.weights[names[0]].shape[1]
            left = max(each for each in range(1, int(width**0.5) + 1) if width % each == 0)
            basis = Kronecker(torch.eye(left), torch.eye(width // left))
            bases |= dict.fromkeys(names, basis)
    return bases


def _rounded(
    weights: Mapping[str, Tensor], bases: Mapping[str, Kronecker], grid: Quantizer
) -> dict[str, Tensor]:
    """Return the weights of a block with its matrices rounded as they are stored."""
    rounded = dict(weights)
    for name, basis in bases.items():
        rounded[name] = basis.back(fake_quantize(basis.into(weights[name]), grid))
    return rounded
