"""How channels are scaled through a block without changing what it computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from paceline.compress.base import Block

if TYPE_CHECKING:
    from torch import Tensor


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
        """Divide the producer's outputs by scales, and multiply the consumers' inputs by them."""
        weights, name = block.weights, self.producer
        if name.endswith("norm"):
            offset = block.config.norm_offset
            weights[name] = (weights[name] + offset) / scales - offset
        else:
            weights[name] = weights[name] / scales[:, None]
        if (bias := weights.get(f"{name}.bias")) is not None:
            weights[f"{name}.bias"] = bias / scales
        for consumer in self.consumers:
            weights[consumer] = weights[consumer] * self.spread(scales)


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

    def weights(self) -> dict[str, Tensor]:
        """Return the scaled weights of the block, differentiable."""
        draft = replace(self._block, weights=dict(self._block.weights))
        for channels, log in zip(self._places, self.logs, strict=True):
            channels.scale(draft, log.exp())
        return draft.weights


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
    if linear_up and "mlp_inner_norm" not in weights:
        yield Channels("up", ("down",))
