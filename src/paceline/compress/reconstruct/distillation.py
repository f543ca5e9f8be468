"""Distillation of a whole model: its compressed copy learns the logits of the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from paceline.compress.reconstruct.objective import round_through
from paceline.compress.reconstruct.split import TextSplit

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from paceline.models.blocks import LayerWeights
    from paceline.models.config import ModelConfig
    from paceline.models.tensors import Linear


@dataclass(frozen=True)
class CompressedModel:
    """A model whose blocks are compressed, all in memory.

    Attributes:
        config: the model's shape.
        outer: float32 tensors outside the layers, as they were.
        layers: float32 tensors of each layer as they were.
        stored: stored matrices and float32 vectors of each layer, compressed.
        texts: int64 [B, T], of calibration.
        scaled: whether transforms changed the matrices before they were compressed, so that
            `layers` are not what they stand for.
        folder: where long work keeps what it has, to go on after an interruption; or None.
    """

    config: ModelConfig
    outer: Mapping[str, Tensor]
    layers: Sequence[Mapping[str, Tensor]]
    stored: Sequence[Mapping[str, Linear | Tensor]]
    texts: Tensor
    scaled: bool
    folder: Path | None = None

    def latent(self, index: int, name: str) -> Tensor:
        """Return what the codes of a matrix stand for, float32 [out, in]: the weights themselves.

        Behind transforms these are not known, and it is the values of the codes.
        """
        import torch

        from paceline.models.tensors import Linear

        stored = self.stored[index][name]
        if not self.scaled:
            return self.layers[index][name]
        return torch.from_numpy(stored.dense()) if isinstance(stored, Linear) else stored


class Distillation:
    """The Kullback-Leibler divergence of a compressed copy from a model, in nats a token.

    Args:
        model: both of them.
        batch: texts of a step.
        kv_bits: of keys and values as the copy sees them, rounded for each head and position to
            whole multiples of a scale; 16 rounds nothing.
        seed: of the order of the texts.
    """

    def __init__(
        self, model: CompressedModel, batch: int, kv_bits: int = 16, seed: int = 0
    ) -> None:
        self._model, self._kv_bits = model, kv_bits
        self._batch = batch
        self.split = TextSplit(len(model.texts), model.texts.shape[1], batch, seed)

    def loss(self, layers: Sequence[LayerWeights], rows: Tensor) -> Tensor:
        """Return the divergence on texts of training, a scalar."""
        return self._loss(layers, rows, self.split.trained_positions)

    def error(self, layers: Sequence[LayerWeights]) -> float:
        """Return the divergence on the texts that are held out; not differentiable."""
        import torch

        held = self.split.held
        with torch.no_grad():
            total = sum(
                float(self._loss(layers, rows, self.split.held_positions)) * len(rows)
                for rows in torch.split(held, self._batch)
            )
        return total / len(held)

    def _loss(self, layers: Sequence[LayerWeights], rows: Tensor, positions: slice) -> Tensor:
        import torch

        tokens = self._model.texts[rows]
        with torch.no_grad():
            right = self._logits(tokens, self._model.layers, 16)[:, positions].log_softmax(-1)
        ours = self._logits(tokens, layers, self._kv_bits)[:, positions].log_softmax(-1)
        divergence: Tensor = (right.exp() * (right - ours)).sum(-1).mean()
        return divergence

    def _logits(self, tokens: Tensor, layers: Sequence[LayerWeights], kv_bits: int) -> Tensor:
        import torch

        from paceline.models import blocks

        config, outer = self._model.config, self._model.outer
        cache = None if kv_bits == 16 else partial(_rounded_cache, bits=kv_bits)
        positions = torch.arange(tokens.shape[-1])
        x = blocks.embed(tokens, positions, config, outer)
        for shape, weights in zip(config.layers, layers, strict=True):
            mask = blocks.causal_mask(positions, shape)
            rotation = blocks.rotation_of(shape, positions)
            x = blocks.block(x, config, shape, weights, mask, rotation, cache)
        return blocks.head(blocks.final_state(x, config, outer), config, outer)


def round_positions(x: Tensor, bits: int) -> Tensor:
    """Round each position of x [..., n] to whole multiples of a scale; gradients pass through.

    Codes of so many bits, with a sign; the scale is the largest magnitude over the largest code.
    """
    if bits == 16:
        return x
    top = 2 ** (bits - 1) - 1
    scales = (x.detach().abs().amax(-1, keepdim=True) / top).clamp(min=1e-12)
    rounded: Tensor = round_through(x / scales) * scales
    return rounded


def rounded_inputs(matrix: Tensor, bits: int) -> Tensor | Callable[[Tensor], Tensor]:
    """Return the product of a matrix [out, in] and inputs rounded to so many bits."""
    from torch.nn import functional as F

    if bits == 16:
        return matrix
    return lambda x: F.linear(round_positions(x, bits), matrix)


def fixed_layer(stored: Mapping[str, Linear | Tensor]) -> dict[str, Tensor]:
    """Return the float32 tensors that a compressed layer stands for."""
    import torch

    from paceline.models.tensors import Linear

    return {
        name: torch.from_numpy(each.dense()) if isinstance(each, Linear) else each
        for name, each in stored.items()
    }


def _rounded_cache(keys: Tensor, values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return round_positions(keys, bits), round_positions(values, bits)
