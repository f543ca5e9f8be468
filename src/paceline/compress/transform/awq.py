"""AWQ: scale up the weights of the channels that matter, so that rounding hurts them less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.compress.base import (
    Block,
    BlockTransform,
    Statistic,
    Statistics,
    WeightCompressor,
)
from paceline.compress.transform.base import Channels, channels_of
from paceline.core import Exactness
from paceline.registry import Source, check_range, transforms

if TYPE_CHECKING:
    from torch import Tensor


@transforms.register("awq", Exactness.LOSSY)
@dataclass(frozen=True)
class AWQ(BlockTransform):
    """Scale input channels by a power of their activations, folded into what comes before.

    The exponent is searched for each group of matrices with one input: the one with the smallest
    squared error of the outputs after compression, tr(D H D') for the error D of the weights and
    the second moment H of the inputs.

    Attributes:
        steps: exponents that are tried between 0 and 1, 1 to 100. Default 20.
    """

    steps: int = 20

    source = Source(
        authors="Lin et al.",
        title="AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
        arxiv="2306.00978",
        section="section 3.2, equations 4 and 5",
        note="root mean squares instead of mean magnitudes; the error by second moments",
    )
    examples = ("awq",)
    statistics = frozenset({Statistic.SECOND_MOMENT})

    def __post_init__(self) -> None:
        check_range(1, 100, self.name, steps=self.steps)

    def transform(self, block: Block, compressor: WeightCompressor) -> None:
        """Scale all channels of the block for which that lowers the error."""
        import torch

        with torch.no_grad():
            for channels in channels_of(block):
                stats = block.stats[channels.consumers[0]]
                scales = self._best(block, channels, stats, compressor.quick)
                if scales is not None:
                    channels.scale(block, scales)

    def _best(
        self, block: Block, channels: Channels, stats: Statistics, compressor: WeightCompressor
    ) -> Tensor | None:
        """Return the scales with the smallest error; None where scaling does not lower it."""
        import torch

        squares = stats.mean_squares
        assert squares is not None
        sizes = channels.gather(squares).sqrt().clamp(min=1e-8)
        best, least = None, torch.inf
        for step in range(self.steps + 1):
            scales = sizes ** (step / self.steps)
            scales = (scales / (scales.max() * scales.min()).sqrt()).clamp(min=1e-4)
            error = self._error(block, channels, stats, compressor, channels.spread(scales))
            if error < least:
                best, least = scales if step else None, error
        return best

    def _error(
        self,
        block: Block,
        channels: Channels,
        stats: Statistics,
        compressor: WeightCompressor,
        scales: Tensor,
    ) -> float:
        import torch

        assert stats.second_moment is not None
        error = 0.0
        scaled = scaled_statistics(stats, scales) if compressor.statistics else Statistics()
        for name in channels.consumers:
            weight = block.weights[name]
            stored = compressor.compress(weight * scales, scaled)
            lost = torch.from_numpy(stored.dense()) / scales - weight
            error += float(((lost @ stats.second_moment) * lost).sum())
        return error


def scaled_statistics(stats: Statistics, scales: Tensor) -> Statistics:
    """Return the statistics of inputs that are divided by scales [in]."""
    norm, moment = stats.input_norm, stats.second_moment
    return Statistics(
        stats.count,
        None if norm is None else norm / scales,
        None if moment is None else moment / scales / scales[:, None],
    )
