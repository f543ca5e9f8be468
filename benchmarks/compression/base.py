"""Write a model that computes the same as another, with its weights shuffled and rescaled.

    python benchmarks/compression/base.py MODEL OUT [--seed 0] [--sigma 0.05]

The real models at hand come from 4-bit files: a format whose blocks lie on the file's own grid
would be lossless by accident. Here residual channels, units of the MLP, groups of heads, query
heads within a group and the values' channels are permuted, and channels are scaled by log-normal
numbers that the neighbouring tensors take back, so that no block holds the weights that it held in
the file. Logits change by rounding only; compressed forms are judged on such bases.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from paceline.compress.checkpoint import Target
from paceline.compress.recipe import Recipe, Steps
from paceline.models import Model, load
from paceline.models.formats.stored_forms import arrays_of
from paceline.models.formats.writer import write_arrays, write_bytes, write_json

Tensors = dict[str, np.ndarray]
_RESIDUAL_INPUTS = ("q", "k", "v", "gate", "up")
_RESIDUAL_OUTPUTS = ("o", "down")


@dataclass
class Shuffle:
    """Permutations and scales of one seed for a model with RMS norms and gated MLPs."""

    model: Model
    seed: int = 0
    sigma: float = 0.05

    def __post_init__(self) -> None:
        self.config = self.model.config
        if self.config.norm != "rms" or not self.config.gated or self.config.parallel:
            raise SystemExit("the shuffle knows models with RMS norms and gated MLPs in a row")
        if any(name.endswith("inner_norm") for name in self.model.weights):
            raise SystemExit("the shuffle knows no norms between two matrices")
        self._rng = np.random.default_rng(self.seed)
        self._residual = self._rng.permutation(self.config.hidden_size)

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield canonical tensors, float32, a layer at a time."""
        weights = self.model.weights
        for name in weights:
            if not name.startswith("layers."):
                values = weights.dense(name)
                yield name, np.ascontiguousarray(values[..., self._residual])
        for index in range(len(self.config.layers)):
            prefix = f"layers.{index}."
            layer = {
                name.removeprefix(prefix): np.array(weights.dense(name))
                for name in weights
                if name.startswith(prefix)
            }
            self._layer(index, layer)
            for name, values in layer.items():
                yield prefix + name, np.ascontiguousarray(values)

    def _layer(self, index: int, layer: Tensors) -> None:
        self._shuffle_residual(layer)
        self._shuffle_units(layer)
        self._shuffle_heads(index, layer)
        self._scale(index, layer)

    def _shuffle_residual(self, layer: Tensors) -> None:
        order = self._residual
        for name in _RESIDUAL_INPUTS:
            layer[name] = layer[name][:, order]
        for name in _RESIDUAL_OUTPUTS:
            layer[name] = layer[name][order]
            if f"{name}.bias" in layer:
                layer[f"{name}.bias"] = layer[f"{name}.bias"][order]
        for name in ("attn_norm", "mlp_norm", "attn_post_norm", "mlp_post_norm"):
            if name in layer:
                layer[name] = layer[name][order]

    def _shuffle_units(self, layer: Tensors) -> None:
        order = self._rng.permutation(len(layer["up"]))
        layer["gate"], layer["up"] = layer["gate"][order], layer["up"][order]
        layer["down"] = layer["down"][:, order]

    def _shuffle_heads(self, index: int, layer: Tensors) -> None:
        shape, rng = self.config.layers[index], self._rng
        times = shape.heads // shape.kv_heads
        groups = rng.permutation(shape.kv_heads)
        heads = np.concatenate([group * times + rng.permutation(times) for group in groups])
        dims = np.stack([rng.permutation(shape.head_dim) for _ in groups])  # of the values
        queries = (heads[:, None] * shape.head_dim + np.arange(shape.head_dim)).reshape(-1)
        keys = (groups[:, None] * shape.head_dim + np.arange(shape.head_dim)).reshape(-1)
        values = (groups[:, None] * shape.head_dim + dims).reshape(-1)
        mixed = (heads[:, None] * shape.head_dim + np.repeat(dims, times, 0)).reshape(-1)
        for name, order in (("q", queries), ("k", keys), ("v", values)):
            for each in (name, f"{name}.bias"):
                if each in layer:
                    layer[each] = layer[each][order]
        layer["o"] = layer["o"][:, mixed]

    def _scale(self, index: int, layer: Tensors) -> None:
        shape, config = self.config.layers[index], self.config
        offset = np.float32(config.norm_offset)
        for norm, readers in (("attn_norm", ("q", "k", "v")), ("mlp_norm", ("gate", "up"))):
            scales = self._scales(config.hidden_size)
            layer[norm] = (layer[norm] + offset) / scales - offset
            for name in readers:
                layer[name] *= scales
        scales = self._scales(len(layer["up"]))
        layer["up"] /= scales[:, None]
        layer["down"] *= scales
        scales = self._scales(len(layer["v"]))
        layer["v"] /= scales[:, None]
        if "v.bias" in layer:
            layer["v.bias"] /= scales
        heads = scales.reshape(shape.kv_heads, shape.head_dim)
        layer["o"] *= np.repeat(heads, shape.heads // shape.kv_heads, 0).reshape(-1)

    def _scales(self, count: int) -> np.ndarray:
        return np.exp(self._rng.normal(0, self.sigma, count)).astype(np.float32)


def write_base(model: Model, out: Path, seed: int = 0, sigma: float = 0.05) -> None:
    """Write a shuffled model in float32."""
    target = Target.of(model, Recipe(Steps()))
    arrays: dict[str, tuple[str, Any]] = {}
    for name, values in Shuffle(model, seed, sigma).tensors():
        moved = values + np.float32(target.norm_offset) if name.endswith("norm") else values
        arrays |= arrays_of(name, moved.astype(np.float32))
    write_arrays(out / "model.safetensors", arrays)
    for name, content in target.texts.items():
        write_bytes(out / name, content)
    write_json(out / "config.json", dict(target.settings))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sigma", type=float, default=0.05)
    asked: SimpleNamespace = parser.parse_args(namespace=SimpleNamespace())
    write_base(load(asked.model), asked.out, asked.seed, asked.sigma)


if __name__ == "__main__":
    main()
