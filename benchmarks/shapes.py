"""What layers, attention and MLP channels that are gone save: the time of a pass, random weights.

    python benchmarks/shapes.py [--shape 135m|1.1b] [--format int8] [--contexts 64 4096]
        [--vocabulary 49152] [--nodes 1] [--threads 2] [--rounds 30]

All forms of a model take turns; medians, and the median ratio to the whole model with quartiles.
Cached rows are random. The layers that are gone are spread over the model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from step import SHAPES, RandomWeights, draw

from paceline.core import TokenTree
from paceline.engines.base import Cached
from paceline.engines.native import NativeEngine, default_threads
from paceline.models.config import LayerConfig, ModelConfig

SHARE = 5  # one in so many layers is gone, and so much of the layers' weights in `narrower`


def spread(layers: Sequence[object], count: int) -> set[int]:
    """Return the places of `count` layers in the middle, with the same distance."""
    step = max(len(layers) // (2 * count), 1)
    first = (len(layers) - step * count) // 2 + 1
    return {first + step * each for each in range(count)}


def _fifth(config: ModelConfig) -> set[int]:
    return spread(config.layers, max(1, len(config.layers) // SHARE))


def without_layers(config: ModelConfig) -> ModelConfig:
    """Return the model without a fifth of its layers."""
    gone = _fifth(config)
    kept = tuple(layer for index, layer in enumerate(config.layers) if index not in gone)
    return replace(config, layers=kept)


def without_attention(config: ModelConfig) -> ModelConfig:
    """Return the model whose attention is gone in a fifth of its layers."""
    gone = _fifth(config)
    layers = (
        replace(layer, heads=0, kv_heads=0) if index in gone else layer
        for index, layer in enumerate(config.layers)
    )
    return replace(config, layers=tuple(layers))


def narrower(config: ModelConfig) -> ModelConfig:
    """Return the model with MLPs so narrow that a fifth of the layers' weights is gone."""

    def width(layer: LayerConfig) -> int:
        attention = 2 * (layer.heads + layer.kv_heads) * layer.head_dim
        gone = (attention + 3 * layer.intermediate) / SHARE / 3
        return layer.intermediate - round(gone / 32) * 32

    layers = (replace(layer, intermediate=width(layer)) for layer in config.layers)
    return replace(config, layers=tuple(layers))


FORMS: dict[str, Callable[[ModelConfig], ModelConfig]] = {
    "whole": lambda config: config,
    "a fifth of the layers gone": without_layers,
    "MLPs narrower, a fifth of the weights gone": narrower,
    "attention gone in a fifth of the layers": without_attention,
}


def filled(engine: NativeEngine, context: int) -> Cached:
    """Return a sequence of random rows."""
    rng, sequence = np.random.default_rng(0), engine.open()

    def rows(layer: LayerConfig) -> NDArray[np.float32]:
        shape = (layer.kv_heads, context, layer.head_dim)
        return rng.standard_normal(shape, np.float32)

    engine.append_rows(sequence, [(rows(each), rows(each)) for each in engine.config.layers])
    return sequence


def pass_times(
    engines: dict[str, NativeEngine], context: int, nodes: int, rounds: int
) -> dict[str, NDArray[np.float64]]:
    """Return the seconds of a pass of each form, float64 [rounds]; the forms take turns."""
    sequences = {name: filled(engine, context) for name, engine in engines.items()}
    times: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(rounds + 1):
        for name, engine in engines.items():
            tree = TokenTree.chain(draw(engine, nodes))
            start = time.perf_counter()
            engine.forward([(sequences[name], tree)])
            if number:
                times[name].append(time.perf_counter() - start)
    for name, engine in engines.items():
        engine.release(sequences[name])
    return {name: np.array(each) for name, each in times.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--vocabulary", type=int, help="tokens; the shape's own by default")
    parser.add_argument("--format", default="int8")
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 4096])
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    whole = SHAPES[options.shape]
    whole = replace(whole, context=max(whole.context, *options.contexts, 0) + options.nodes)
    if options.vocabulary is not None:
        whole = replace(whole, vocab_size=options.vocabulary)
    engines = {}
    for name, change in FORMS.items():
        config = change(whole)
        weights = RandomWeights(config)
        engines[name] = NativeEngine(config, weights, options.threads, options.format)
    print(f"{options.shape}, {options.format}, {options.nodes} nodes, {options.threads} threads\n")
    print("| positions | form | MB | ms | ratio | quartiles |")
    print("|---:|---|---:|---:|---:|---|")
    for context in options.contexts:
        times = pass_times(engines, context, options.nodes, options.rounds)
        for name, seconds in times.items():
            ratios = times["whole"] / seconds
            low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
            size = (engines[name].weight_bytes or 0) / 1e6
            print(
                f"| {context} | {name} | {size:.1f} | {1e3 * float(np.median(seconds)):.2f} | "
                f"{middle:.3f} | {low:.3f} to {high:.3f} |"
            )


if __name__ == "__main__":
    main()
