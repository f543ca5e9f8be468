"""A model of floating-point layers that is run, measured and changed as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from paceline.models.config import LayerConfig, ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.blocks import LayerWeights, Tap

_TOGETHER = 4096  # positions that run through a block at once
_HEADED = 64  # positions whose logits are in memory at once, so that caches hold them


@dataclass(frozen=True)
class WholeModel:
    """A model, the texts it is calibrated on, and functions to run it.

    Attributes:
        config: the model's shape.
        layer: reads the float32 tensors of a layer by its index.
        outer: float32 tensors outside the layers.
        texts: int64 [B, T], of calibration.
    """

    config: ModelConfig
    layer: Callable[[int], Mapping[str, Tensor]]
    outer: Mapping[str, Tensor]
    texts: Tensor

    def embed(self, tokens: Tensor) -> Tensor:
        """Return what goes into the first block, [B, T, hidden], for tokens int64 [B, T]."""
        import torch

        from paceline.models import blocks

        return blocks.embed(tokens, torch.arange(tokens.shape[1]), self.config, self.outer)

    def run(self, index: int, x: Tensor, tap: Tap | None = None) -> Tensor:
        """Return the outputs of a block for inputs [B, T, hidden], without gradients."""
        return run_frozen(self.config, self.config.layers[index], self.layer(index), x, tap)

    @property
    def matrix_weights(self) -> int:
        """Number of weights of the matrices in the layers."""
        return sum(
            each.numel()
            for index in range(len(self.config.layers))
            for each in self.layer(index).values()
            if each.dim() == 2
        )

    def with_layers(self, layers: Iterable[tuple[LayerConfig, Mapping[str, Tensor]]]) -> WholeModel:
        """Return a model with other layers, whose tensors are in memory."""
        kept = list(layers)
        config = replace(self.config, layers=tuple(shape for shape, _ in kept))
        return replace(self, config=config, layer=lambda index: kept[index][1])

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits [T, V] of the last block's outputs [T, hidden]."""
        from paceline.models import blocks

        state = blocks.final_state(x, self.config, self.outer)
        return blocks.head(state, self.config, self.outer)

    def log_probs(self, x: Tensor) -> Tensor:
        """Return log-probabilities [T, V] of tokens for the last block's outputs [T, hidden]."""
        return self.logits(x).log_softmax(-1)

    @cached_property
    def in_memory(self) -> WholeModel:
        """The same model with all layers in memory, for methods that run it many times."""
        layers = [dict(self.layer(index)) for index in range(len(self.config.layers))]
        return replace(self, layer=lambda index: layers[index])


def run_block(
    config: ModelConfig,
    shape: LayerConfig,
    weights: LayerWeights,
    x: Tensor,
    tap: Tap | None = None,
) -> Tensor:
    """Return the outputs of one block for inputs [B, T, hidden], some texts at a time."""
    import torch

    from paceline.models import blocks

    positions = torch.arange(x.shape[1])
    mask = blocks.causal_mask(positions, shape)
    rotation = blocks.rotation_of(shape, positions)
    step = max(1, _TOGETHER // x.shape[1])
    parts = (
        blocks.block(part, config, shape, weights, mask, rotation, tap=tap)
        for part in torch.split(x, step)
    )
    return torch.cat(list(parts))


def run_frozen(
    config: ModelConfig,
    shape: LayerConfig,
    weights: LayerWeights,
    x: Tensor,
    tap: Tap | None = None,
) -> Tensor:
    """Return the outputs of one block as `run_block`, without gradients."""
    import torch

    with torch.no_grad():
        return run_block(config, shape, weights, x, tap)


def divergence(model: WholeModel, right: Tensor, x: Tensor) -> float:
    """Return the mean Kullback-Leibler divergence of two states of a model, in nats per token.

    Args:
        model: whose head both have.
        right: float32 [B, T, hidden], outputs of the last block of the model that is right.
        x: the same of another.
    """
    import torch

    total = 0.0
    with torch.no_grad():
        pairs = zip(
            torch.split(right.flatten(0, 1), _HEADED),
            torch.split(x.flatten(0, 1), _HEADED),
            strict=True,
        )
        for one, other in pairs:
            wanted = model.log_probs(one)
            total += float((wanted.exp() * (wanted - model.log_probs(other))).sum())
    return total / (right.shape[0] * right.shape[1])
