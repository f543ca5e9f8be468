"""TEQ: learn the scales of channels by gradients through the rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.compress.base import MATRICES, Block, BlockTransform, WeightCompressor
from paceline.compress.reconstruct.fake_quantize import fake_quantize, grid_of
from paceline.compress.reconstruct.objective import Objective, train
from paceline.compress.transform.base import ChannelScales
from paceline.core import Exactness
from paceline.registry import Source, check_range, transforms

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.compress.quantize.base import Quantizer


@transforms.register("teq", Exactness.LOSSY)
@dataclass(frozen=True)
class TEQ(BlockTransform):
    """Train the scales of channels on the outputs of the block, folded into what comes before.

    All scales of a block are trained together by Adam, while its matrices are rounded to the grid
    of the quantizer that follows. One in eight texts is not trained on; where the error on those
    does not fall, the block stays as it was. After `awq` it begins at what that found.

    Attributes:
        steps: of Adam for each block, 1 to 100000. Default 48.
        rate: learning rate of the logarithms of the scales, above 0 and up to 1. Default 0.02.
        batch: texts of a step, 1 to 1024. Default 2.
    """

    steps: int = 48
    rate: float = 0.02
    batch: int = 2

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

    def __post_init__(self) -> None:
        check_range(1, 100_000, self.name, steps=self.steps)
        check_range(1e-9, 1.0, self.name, rate=self.rate)
        check_range(1, 1024, self.name, batch=self.batch)

    def transform(self, block: Block, compressor: WeightCompressor) -> None:
        """Scale the channels of the block as training found."""
        import torch

        grid = grid_of(compressor, self.name)
        objective = Objective(block, self.batch)
        scales = ChannelScales(block)
        before = objective.error(rounded(block.weights, grid))
        parameters = [(log, 1.0) for log in scales.logs]
        train(objective, lambda: rounded(scales.weights(), grid), parameters, self.steps, self.rate)
        with torch.no_grad():
            weights = scales.weights()
            if objective.error(rounded(weights, grid)) < before:
                block.weights.update(weights)


def rounded(weights: Mapping[str, Tensor], grid: Quantizer) -> dict[str, Tensor]:
    """Return the weights of a block with its matrices rounded to a grid, differentiable."""
    return {
        name: fake_quantize(each, grid) if name in MATRICES else each
        for name, each in weights.items()
    }
