"""The frozen model itself, run in torch, for heads that train what goes into it."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models import Model


class FrozenModel:
    """A checkpoint's layers in float32, read when they are first run; gradients pass through.

    Args:
        model: the checkpoint.
    """

    def __init__(self, model: Model) -> None:
        self._model = model

    @cached_property
    def _outer(self) -> dict[str, Tensor]:
        kept = [name for name in self._model.weights if not name.startswith("layers.")]
        return {name: self._tensor(name) for name in kept}

    @cached_property
    def _layers(self) -> list[dict[str, Tensor]]:
        layers: list[dict[str, Tensor]] = [{} for _ in self._model.config.layers]
        for name in self._model.weights:
            if name.startswith("layers."):
                _, index, rest = name.split(".", 2)
                layers[int(index)][rest] = self._tensor(name)
        return layers

    def states(self, embeddings: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        """Return the states after the last norm, [B, T, D]; differentiable.

        Args:
            embeddings: float32 [B, T, D], as rows of the embedding matrix.
            positions: int64 [T].
            seen: bool [B, T, T], which node reads which; windows of layers apply as well.
        """
        import torch

        from paceline.models import blocks

        config, outer = self._model.config, self._outer
        x = embeddings * config.embedding_scale
        if config.learned_positions:
            x = x + outer["positions"][positions + config.position_offset]
        distance = positions[:, None] - positions
        for layer, weights in zip(config.layers, self._layers, strict=True):
            near = seen & layer.near(distance, positions)
            mask = torch.zeros(near.shape).masked_fill(~near, -torch.inf)[:, None]  # [B, 1, T, T]
            x = blocks.block(x, config, layer, weights, mask, blocks.rotation_of(layer, positions))
        return blocks.final_state(x, config, outer)

    def _tensor(self, name: str) -> Tensor:
        import torch

        with torch.inference_mode(False):  # gradients pass through whoever runs it first
            return torch.from_numpy(np.array(self._model.weights.dense(name), np.float32))
