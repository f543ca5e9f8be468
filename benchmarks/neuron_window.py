"""Neurons with ReLU read from a file: how many are active, how many must be read, and the time.

    python benchmarks/neuron_window.py facebook/opt-1.3b --shares 0.1 0.3 --tokens 128
    python benchmarks/neuron_window.py --random 768:3072:12 --active 0.05

A text of `--tokens` tokens is run token by token, and once more as trees of `--nodes` nodes, by the
reference engine with all weights in memory, and with windows of a share of the neurons. Without a
model weights are random, in the shape HIDDEN:NEURONS:LAYERS of OPT, with biases that let about
`--active` of the neurons be active. Random tokens have little in common: what a window saves
between tokens is seen on models that were trained only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist
from time import perf_counter

import numpy as np

from paceline.core import Floats, TokenTree
from paceline.engines.neuron_window import neuron_bytes
from paceline.engines.reference import ReferenceEngine
from paceline.engines.sides import has_rectified_neurons
from paceline.models import load
from paceline.models.config import LayerConfig, ModelConfig
from paceline.models.tensors import Linear

_VOCABULARY, _HEAD = 512, 64


def random_model(shape: str, active: float, context: int) -> tuple[ModelConfig, dict[str, Floats]]:
    """Return an OPT-like model with random weights."""
    hidden, neurons, count = map(int, shape.split(":"))
    heads = max(hidden // _HEAD, 1)
    layer = LayerConfig(heads, heads, hidden // heads, neurons, None, None)
    config = ModelConfig(
        family="opt",
        vocab_size=_VOCABULARY,
        hidden_size=hidden,
        layers=(layer,) * count,
        context=context,
        norm="layer",
        norm_eps=1e-5,
        attention_scale=(hidden // heads) ** -0.5,
        activation="relu",
        gated=False,
        tied=True,
    )
    random = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> Floats:
        return (random.standard_normal((rows, columns)) / columns**0.5).astype(np.float32)

    weights = {"embed": matrix(_VOCABULARY, hidden)}
    norms = ["final_norm"]
    for index in range(count):
        prefix = f"layers.{index}."
        weights |= {f"{prefix}{name}": matrix(hidden, hidden) for name in "qkvo"}
        weights |= {
            f"{prefix}up": matrix(neurons, hidden),
            f"{prefix}down": matrix(hidden, neurons),
        }
        shift = NormalDist().inv_cdf(active)
        weights[f"{prefix}up.bias"] = np.full(neurons, shift, np.float32)
        norms += [f"{prefix}attn_norm", f"{prefix}mlp_norm"]
    for name in norms:
        weights |= {name: np.ones(hidden, np.float32), f"{name}.bias": np.zeros(hidden, np.float32)}
    return config, weights


def run(engine: ReferenceEngine, text: np.ndarray, nodes: int) -> tuple[Floats, float]:
    """Run a text in chains of `nodes`; return the logits of the last one, and seconds."""
    sequence, start = engine.open(), perf_counter()
    logits = np.empty(0, np.float32)
    for first in range(0, len(text) - nodes + 1, nodes):
        tree = TokenTree.chain(text[first : first + nodes])
        logits = engine.forward([(sequence, tree)])
        engine.commit(sequence, np.arange(nodes))
    seconds = perf_counter() - start
    engine.release(sequence)
    return logits.copy(), seconds


def measure(
    config: ModelConfig,
    weights: Mapping[str, Linear | Floats],
    share: float,
    text: np.ndarray,
    nodes: int,
) -> dict[str, float]:
    """Return what windows of a share of the neurons read, and how long passes take."""
    whole = ReferenceEngine(config, weights)
    expected, plain = run(whole, text, nodes)
    outer = sum(each.nbytes for each in whole._outer.values())
    held = sum(each.nbytes for layer in whole._layers for each in layer.values())  # type: ignore[union-attr]
    all_neurons = neuron_bytes(config, 4)
    copies = sum(each.intermediate * (config.hidden_size + 24) for each in config.layers)
    del whole
    budget = int(outer + held - all_neurons + copies + share * all_neurons)
    engine = ReferenceEngine(config, weights, weights_memory=budget)
    run(engine, text[: 4 * nodes], nodes)  # fills the windows
    before = sum(each.used for each in engine.windows), sum(each.missed for each in engine.windows)
    found, seconds = run(engine, text, nodes)
    used = sum(each.used for each in engine.windows) - before[0]
    missed = sum(each.missed for each in engine.windows) - before[1]
    passes = len(text) // nodes
    every = passes * sum(each.neurons for each in engine.windows)
    return {
        "memory_mb": budget / 1e6,
        "all_mb": (outer + held) / 1e6,
        "active": used / every,
        "read": missed / every,
        "mb_per_pass": missed * engine.windows[0].bundle_bytes / passes / 1e6,
        "ms_per_pass": 1e3 * seconds / passes,
        "ms_in_memory": 1e3 * plain / passes,
        "largest_difference": float(np.abs(found - expected).max()),
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--random", default="768:3072:12", help="shape without a model")
    parser.add_argument("--active", type=float, default=0.05, help="share of random neurons")
    parser.add_argument("--text", type=Path, help="is run; without it, random tokens")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    text = np.random.default_rng(1).integers(3, _VOCABULARY, asked.tokens).astype(np.int32)
    weights: Mapping[str, Linear | Floats]
    if asked.model is None:
        config, weights = random_model(asked.random, asked.active, asked.tokens + 2)
    else:
        model = load(asked.model)
        config, weights = model.config, model.weights
        if not has_rectified_neurons(config, weights):
            raise SystemExit(f"{asked.model} has no feed-forward layers with ReLU alone")
        if asked.text is not None:
            ids = model.tokenizer.encode(asked.text.read_text()[: 16 * asked.tokens])
            text = np.array(ids[: asked.tokens], np.int32)
    found = {}
    for nodes in asked.nodes:
        for share in asked.shares:
            name = f"{nodes} nodes, windows of {share:.2f}"
            found[name] = measure(config, weights, share, text, nodes)
            shown = ", ".join(f"{key} {value:.3g}" for key, value in found[name].items())
            print(f"{name}: {shown}", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1))
    if max(each["largest_difference"] for each in found.values()) > ReferenceEngine.tolerance:
        raise SystemExit("logits are not those of the engine in memory")


if __name__ == "__main__":
    main()
