"""FlatQuant: learn an invertible transform of the inputs under which weights round better."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from paceline.compress.base import GROUPS, Block
from paceline.compress.kronecker import Kronecker
from paceline.compress.reconstruct.fake_quantize import fake_quantize
from paceline.compress.reconstruct.objective import Objective
from paceline.compress.transform.base import ChannelScales, TrainedParts, TrainedTransform
from paceline.core import Exactness
from paceline.registry import Source, transforms

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.compress.quantize.base import Quantizer

_FACTOR_SHARE = 0.1  # of the rate, for entries of the factors


@transforms.register("flatquant", Exactness.LOSSY)
@dataclass(frozen=True)
class FlatQuant(TrainedTransform):
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

    def parts(self, block: Block, grid: Quantizer, objective: Objective) -> FlatParts:
        """Return the scales of all channels, and identities as transforms."""
        return FlatParts(block, grid)


class FlatParts(TrainedParts):
    """The scales of the channels of a block, and the transforms of its inputs."""

    def __init__(self, block: Block, grid: Quantizer) -> None:
        self._scales, self._bases, self._grid = ChannelScales(block), _identities(block), grid

    def groups(self) -> list[tuple[Tensor, float]]:
        """Return the factors of the transforms and the logarithms of the scales."""
        bases = self._bases.values()
        factors = {id(each): each for basis in bases for each in (basis.left, basis.right)}
        pairs = [(each.requires_grad_(), _FACTOR_SHARE) for each in factors.values()]
        return [*pairs, *self._scales.groups()]

    def rounded(self) -> dict[str, Tensor]:
        """Return the weights with the matrices rounded as they multiply transformed inputs."""
        weights = self._scales.weights()
        for name, basis in self._bases.items():
            weights[name] = basis.back(fake_quantize(basis.into(weights[name]), self._grid))
        return weights

    def freeze(self) -> None:
        """Round the factors to half precision."""
        self._bases = {name: basis.halved() for name, basis in self._bases.items()}

    def apply(self, block: Block) -> None:
        """Write the scaled weights and the transforms."""
        block.weights.update(self._scales.weights())
        block.bases.update(self._bases)


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
