"""TEQ: learn the scales of channels by gradients through the rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from paceline.compress.base import MATRICES, Block
from paceline.compress.reconstruct.fake_quantize import fake_quantize
from paceline.compress.reconstruct.objective import Objective
from paceline.compress.transform.base import ChannelScales, TrainedParts, TrainedTransform
from paceline.core import Exactness
from paceline.registry import Source, transforms

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.compress.quantize.base import Quantizer


@transforms.register("teq", Exactness.LOSSY)
@dataclass(frozen=True)
class TEQ(TrainedTransform):
    """Train the scales of channels on the outputs of the block, folded into what comes before.

    All scales of a block are trained together by Adam, while its matrices are rounded to the grid
    of the quantizer that follows. One in eight texts is not trained on; where the error on those
    does not fall, the block stays as it was. After `awq` it begins at what that found.

    Attributes:
        steps: of Adam for each block, 1 to 100000. Default 48.
        rate: learning rate of the logarithms of the scales, above 0 and up to 1. Default 0.02.
        batch: texts of a step, 1 to 1024. Default 2.
    """

    source = Source(
        authors="Cheng et al.",
        title="TEQ: Trainable Equivalent Transformation for Quantization of LLMs",
        arxiv="2310.10944",
        section="section 3.2",
        note="block by block on the block's outputs, where the paper trains on the loss of the "
        "model",
    )
    catalogue = (281,)
    examples = ("teq:steps=8",)
    rescales: ClassVar[bool] = True

    def parts(self, block: Block, grid: Quantizer, objective: Objective) -> ScaledChannels:
        """Return the scales of all channels."""
        return ScaledChannels(block, grid)


class ScaledChannels(TrainedParts):
    """The scales of the channels of a block whose matrices are rounded to a grid."""

    def __init__(self, block: Block, grid: Quantizer) -> None:
        self._scales, self._grid = ChannelScales(block), grid

    def groups(self) -> list[tuple[Tensor, float]]:
        """Return the logarithms of the scales."""
        return self._scales.groups()

    def rounded(self) -> dict[str, Tensor]:
        """Return the scaled weights, rounded."""
        return rounded(self._scales.weights(), self._grid)

    def apply(self, block: Block) -> None:
        """Write the scaled weights."""
        self._scales.apply(block)


def rounded(weights: Mapping[str, Tensor], grid: Quantizer) -> dict[str, Tensor]:
    """Return the weights of a block with its matrices rounded to a grid, differentiable."""
    return {
        name: fake_quantize(each, grid) if name in MATRICES else each
        for name, each in weights.items()
    }
