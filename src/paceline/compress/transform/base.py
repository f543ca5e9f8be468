"""How channels are scaled through a block without changing what it computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from paceline.compress.base import Block, BlockTransform, WeightCompressor
from paceline.compress.reconstruct.fake_quantize import grid_of
from paceline.compress.reconstruct.objective import Objective, train
from paceline.registry import check_range

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.compress.quantize.base import Quantizer
    from paceline.models.blocks import LayerWeights


@dataclass(frozen=True)
class Channels:
    """Channels between a producer and its consumers.

    Dividing an output of the producer and multiplying the inputs of the consumers by the same
    number changes nothing.

    Attributes:
        producer: a norm or a matrix.
        consumers: matrices whose inputs are the channels.
        repeats: (heads of keys and values, query heads of each, size of a head) where each output
            of the producer is read several times, as by grouped-query attention; or None.
    """

    producer: str
    consumers: tuple[str, ...]
    repeats: tuple[int, int, int] | None = None

    def spread(self, scales: Tensor) -> Tensor:
        """Return the scale of each input of the consumers, from those of the producer's outputs."""
        if self.repeats is None:
            return scales
        heads, times, size = self.repeats
        return scales.reshape(heads, 1, size).expand(heads, times, size).reshape(-1)

    def gather(self, values: Tensor) -> Tensor:
        """Return for each output of the producer the mean over the inputs that read it."""
        if self.repeats is None:
            return values
        heads, times, size = self.repeats
        return values.reshape(heads, times, size).mean(1).reshape(-1)

    def scale(self, block: Block, scales: Tensor) -> None:
        """Divide the producer's outputs by scales, and multiply the consumers' weights by them.

        Statistics of the consumers' inputs follow.
        """
        weights, name = block.weights, self.producer
        if name.endswith("norm"):
            offset = block.config.norm_offset
            weights[name] = (weights[name] + offset) / scales - offset
        else:
            weights[name] = weights[name] / scales[:, None]
        if (bias := weights.get(f"{name}.bias")) is not None:
            weights[f"{name}.bias"] = bias / scales
        spread = self.spread(scales)
        for consumer in self.consumers:
            weights[consumer] = weights[consumer] * spread
        if (stats := block.stats.get(self.consumers[0])) is not None:
            block.stats.update(dict.fromkeys(self.consumers, stats.rescaled(spread)))


class ChannelScales:
    """Scales of all channels of a block, as parameters.

    Attributes:
        logs: logarithms of the scales at each place, float32; zero in the beginning.
    """

    def __init__(self, block: Block) -> None:
        import torch

        self._block, self._places = block, tuple(channels_of(block))
        widths = [len(block.weights[each.producer]) for each in self._places]
        self.logs = [torch.zeros(width, requires_grad=True) for width in widths]

    def groups(self) -> list[tuple[Tensor, float]]:
        """Return the parameters, each with its factor of the learning rate."""
        return [(log, 1.0) for log in self.logs]

    def weights(self) -> dict[str, Tensor]:
        """Return the scaled weights of the block, differentiable."""
        draft = replace(self._block, weights=dict(self._block.weights), stats={})
        self.apply(draft)
        return draft.weights

    def apply(self, block: Block) -> None:
        """Scale all channels of a block."""
        for channels, log in zip(self._places, self.logs, strict=True):
            channels.scale(block, log.exp())


class TrainedParts(ABC):
    """The parameters of a transform of one block."""

    @abstractmethod
    def groups(self) -> list[tuple[Tensor, float]]:
        """Return the parameters, each with its factor of the learning rate."""

    @abstractmethod
    def rounded(self) -> LayerWeights:
        """Return the weights of the block as they will be rounded, differentiable."""

    def freeze(self) -> None:
        """Round the parameters to what is stored of them."""

    @abstractmethod
    def apply(self, block: Block) -> None:
        """Write the transform into a block."""

    def skip(self, block: Block) -> None:
        """Write what a block needs where training did not help; nothing by default."""


@dataclass(frozen=True)
class TrainedTransform(BlockTransform):
    """Trains its parameters by Adam on the outputs of a block whose matrices are rounded.

    The grid is that of the quantizer that follows. One in eight texts is not trained on; where the
    error on those does not fall, the block stays as it was.

    Attributes:
        steps: of Adam for each block, 1 to 100000. Default 48.
        rate: learning rate of the logarithms of scales, above 0 and up to 1. Default 0.02.
        batch: texts of a step, 1 to 1024. Default 2.
    """

    steps: int = 48
    rate: float = 0.02
    batch: int = 2

    def __post_init__(self) -> None:
        check_range(1, 100_000, self.name, steps=self.steps)
        check_range(1e-9, 1.0, self.name, rate=self.rate)
        check_range(1, 1024, self.name, batch=self.batch)

    @abstractmethod
    def parts(self, block: Block, grid: Quantizer, objective: Objective) -> TrainedParts:
        """Return the parameters where training begins."""

    def transform(self, block: Block, compressor: WeightCompressor) -> None:
        """See `BlockTransform`."""
        import torch

        grid = grid_of(compressor, self.name)
        objective = Objective(block, self.batch)
        parts = self.parts(block, grid, objective)
        before = objective.error(parts.rounded())
        train(objective, parts.rounded, parts.groups(), self.steps, self.rate)
        with torch.no_grad():
            parts.freeze()
            if objective.error(parts.rounded()) < before:
                parts.apply(block)
            else:
                parts.skip(block)


def channels_of(block: Block) -> Iterator[Channels]:
    """Yield the places of a block at which channels can be scaled, in the order of the pass."""
    weights, config, shape = block.weights, block.config, block.shape
    if "attn_norm" in weights:
        yield Channels("attn_norm", ("q", "k", "v"))
    if "v" in weights and "attn_inner_norm" not in weights and config.qkv_clip is None:
        times = shape.heads // shape.kv_heads
        repeats = None if times == 1 else (shape.kv_heads, times, shape.head_dim)
        yield Channels("v", ("o",), repeats)
    if "mlp_norm" in weights:
        consumers = tuple(name for name in ("gate", "up") if name in weights)
        yield Channels("mlp_norm", consumers)
    linear_up = config.gated or config.activation in ("relu",)
    if linear_up and "up" in weights and "mlp_inner_norm" not in weights:
        yield Channels("up", ("down",))
