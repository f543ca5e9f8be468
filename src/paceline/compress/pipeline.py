"""Compress a model block by block: calibrate each on the outputs of those compressed before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from paceline.compress.base import Statistics, WeightCompressor
from paceline.models import blocks
from paceline.models.config import ModelConfig
from paceline.models.tensors import Linear

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


@torch.inference_mode()
def compress_blocks(
    config: ModelConfig,
    outer: Mapping[str, Tensor],
    layer: Callable[[int], Mapping[str, Tensor]],
    tokens: Tensor,
    method: WeightCompressor,
) -> Iterator[tuple[str, Linear]]:
    """Compress every matrix of the decoder blocks, in order.

    The error of earlier blocks reaches the calibration of later ones. One block's tensors are in
    memory at a time, besides the hidden states of the calibration texts.

    Args:
        config: the model's shape.
        outer: float32 tensors outside the layers; only the embeddings are read.
        layer: reads the float32 tensors of a layer by its index.
        tokens: int64 [B, T], calibration texts of one length.
        method: compresses each matrix.

    Yields:
        the canonical name, e.g. `layers.0.q`, and the stored form.
    """
    positions = torch.arange(tokens.shape[1])
    x = blocks.embed(tokens, positions, config, outer)
    for index, shape in enumerate(config.layers):
        weights = dict(layer(index))
        mask = blocks.causal_mask(positions, shape.window)
        rotation = blocks.rotation_of(shape, positions)
        stats = {name: Statistics() for name in MATRICES if name in weights}

        def tap(name: str, seen: Tensor, stats: dict[str, Statistics] = stats) -> None:
            if name in stats:
                stats[name] = stats[name].plus(seen, method.statistics)

        if method.statistics:
            blocks.block(x, config, shape, weights, mask, rotation, tap=tap)
        for name, seen in stats.items():
            stored = method.compress(weights[name], seen)
            weights[name] = torch.from_numpy(stored.dense())
            yield f"layers.{index}.{name}", stored
        x = blocks.block(x, config, shape, weights, mask, rotation)
