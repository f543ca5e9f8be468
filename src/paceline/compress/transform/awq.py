"""AWQ: scale up the weights of the channels that matter, so that rounding hurts them less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from paceline.compress.base import (
    Block,
    BlockTransform,
    Statistic,
    Statistics,
    WeightCompressor,
)
from paceline.compress.quantize.rtn import RoundToNearest
from paceline.compress.transform.base import Channels, channels_of
from paceline.core import Exactness
from paceline.registry import Source, check_range, transforms

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 384  # of a matrix that errors are computed for, at least where it has more


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
    rescales: ClassVar[bool] = True

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
        weights = [_some_rows(block.weights[name], compressor) for name in channels.consumers]
        best, least = None, torch.inf
        for step in range(self.steps + 1):
            scales = sizes ** (step / self.steps)
            scales = (scales / (scales.max() * scales.min()).sqrt()).clamp(min=1e-4)
            spread = channels.spread(scales)
            scaled = stats.rescaled(spread) if compressor.statistics else Statistics()
            error = sum(
                _error(weight, share, spread, compressor, stats, scaled)
                for weight, share in weights
            )
            if error < least:
                best, least = scales if step else None, error
        return best


def _some_rows(weight: Tensor, compressor: WeightCompressor) -> tuple[Tensor, float]:
    """Return rows that stand for a matrix, evenly spread, and how many rows each stands for.

    Rows of integers in groups are rounded apart from each other, so that some of them suffice.
    """
    if not isinstance(compressor, RoundToNearest):
        return weight, 1.0
    step = max(1, len(weight) // _ROWS)
    rows = weight[::step]
    return rows, len(weight) / len(rows)


def _error(
    weight: Tensor,
    share: float,
    scales: Tensor,
    compressor: WeightCompressor,
    stats: Statistics,
    scaled: Statistics,
) -> float:
    """Return the squared error of the outputs of rows, each of which counts `share` times."""
    import torch

    assert stats.second_moment is not None
    if isinstance(compressor, RoundToNearest):
        values = compressor.nearest(weight * scales, scaled)
    else:
        values = torch.from_numpy(compressor.compress(weight * scales, scaled).dense())
    lost = values / scales - weight
    return share * float(((lost @ stats.second_moment) * lost).sum())
