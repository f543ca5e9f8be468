"""T(n): how long one pass over n nodes takes, at real shapes with random weights.

    python benchmarks/step.py [--shape 135m|1.1b] [--format fp32] [--threads N] [--isa NAME]

Random weights say nothing about quality or acceptance; the time of a pass does not depend on them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Mapping

import numpy as np

from paceline import _native
from paceline.core import Floats, TokenTree
from paceline.engines.native import FORMATS, NativeEngine, default_threads
from paceline.models.config import LayerConfig, ModelConfig
from paceline.models.rope import Rope

SIZES = (1, 2, 4, 8, 16, 32, 64)
CACHED = 64  # positions before the pass


def llama(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int) -> ModelConfig:
    """A Llama with tied embeddings and 32,000 tokens."""
    dim = hidden // heads
    layer = LayerConfig(heads, kv_heads, dim, intermediate, rope=Rope(1e4, dim))
    return ModelConfig(
        family="llama",
        vocab_size=32_000,
        hidden_size=hidden,
        context=2048,
        layers=(layer,) * layers,
        norm="rms",
        norm_eps=1e-5,
        activation="silu",
        gated=True,
        attention_scale=dim**-0.5,
        tied=True,
    )


SHAPES = {"135m": llama(576, 30, 9, 3, 1536), "1.1b": llama(2048, 22, 32, 4, 5632)}


class RandomWeights(Mapping[str, Floats]):
    """Weights of any shape, drawn when asked for; those of layers ternary if wished."""

    def __init__(self, config: ModelConfig, ternary: bool = False) -> None:
        self._ternary = ternary
        hidden = config.hidden_size
        self._shapes: dict[str, tuple[int, ...]] = {
            "embed": (config.vocab_size, hidden),
            "final_norm": (hidden,),
        }
        for i, layer in enumerate(config.layers):
            queries, keys = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
            self._shapes |= {
                f"layers.{i}.{name}": shape
                for name, shape in {
                    "attn_norm": (hidden,),
                    "q": (queries, hidden),
                    "k": (keys, hidden),
                    "v": (keys, hidden),
                    "o": (hidden, queries),
                    "mlp_norm": (hidden,),
                    "gate": (layer.intermediate, hidden),
                    "up": (layer.intermediate, hidden),
                    "down": (hidden, layer.intermediate),
                }.items()
            }
        self._rng = np.random.default_rng(0)

    def __getitem__(self, name: str) -> Floats:
        shape = self._shapes[name]
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        values = self._rng.random(shape, np.float32)
        values -= 0.5
        if self._ternary and "." in name:
            np.rint(values * 2.9, out=values)
            values *= np.float32(0.3)
        values *= np.float32(3.5 * shape[-1] ** -0.5)
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def step_times(engine: NativeEngine, sizes: tuple[int, ...], repeat: int) -> dict[int, float]:
    """Median seconds of a pass over n nodes; sizes are interleaved."""
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(0, engine.config.vocab_size, n).astype(np.int32)  # noqa: E731
    sequence = engine.start(draw(CACHED))
    times: dict[int, list[float]] = {n: [] for n in sizes}
    for _ in range(repeat + 1):
        for n in sizes:
            tree = TokenTree.chain(draw(n))
            start = time.perf_counter()
            engine.forward([(sequence, tree)])
            times[n].append(time.perf_counter() - start)
    engine.release(sequence)
    return {n: statistics.median(values[1:]) for n, values in times.items()}


def report(engine: NativeEngine, shape: str, sizes: tuple[int, ...], repeat: int) -> None:
    """Measure and print one table."""
    before = _native.read_bandwidth(engine.threads)
    times = step_times(engine, sizes, repeat)
    bandwidth = max(before, _native.read_bandwidth(engine.threads)) / 1e9
    rate = engine.bytes / times[sizes[0]] / 1e9
    print(
        f"{shape} {engine.format} {engine.isa}, {engine.threads} threads: "
        f"{1 / times[sizes[0]]:.1f} tok/s plain, {rate:.1f} GB/s, "
        f"{rate / bandwidth:.0%} of the {bandwidth:.1f} GB/s measured"
    )
    parameters = engine.parameters
    print("     n      ms  T(n)/T(1)  GMAC/s")
    for n, seconds in times.items():
        macs = n * parameters / seconds / 1e9
        print(f"{n:6d} {seconds * 1e3:7.1f} {seconds / times[sizes[0]]:10.2f} {macs:7.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--format", action="append", help="one of FORMATS, or with ,head=FORMAT")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--isa", default="")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    options = parser.parse_args()
    for shape in options.shape or SHAPES:
        for storage in options.format or FORMATS:
            config = SHAPES[shape]
            weights = RandomWeights(config, storage.startswith("ternary"))
            engine = NativeEngine(config, weights, options.threads, storage, options.isa)
            report(engine, shape, tuple(options.sizes), options.repeat)
            del engine


if __name__ == "__main__":
    main()
