"""T(n): how long one pass over n nodes takes: real shapes with random weights, or a checkpoint.

    python benchmarks/step.py [--shape 135m|1.1b | --model PATH] [--format fp32] [--threads N]
        [--isa NAME] [--context 64] [--kv-format fp32] [--prompt 1000] [--profile]

`--prompt` also times a prompt of so many tokens without logits.
`--profile` shows where the time of a pass goes, by kind of work, beside the machine's ceilings: the
memory's speed as measured by plain reading, and the multiply-adds that the same work reaches in a
pass over 256 nodes. Work is timed from the beginning of a phase to that of the next one; `waiting`
is the share of it in which threads had nothing to do.

Random weights say nothing about quality or acceptance; the time of a pass does not depend on them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Mapping

import numpy as np

from paceline import _native
from paceline.core import Floats, Tokens, TokenTree
from paceline.engines.base import Cached
from paceline.engines.native import FORMATS, KV_FORMATS, NativeEngine, Spent, default_threads
from paceline.models import load
from paceline.models.config import LayerConfig, ModelConfig
from paceline.models.rope import Rope
from paceline.models.tensor_names import has_part

SIZES = (1, 2, 4, 8, 16, 32, 64)
MANY = 256  # nodes whose pass is limited by arithmetic alone


def llama(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int) -> ModelConfig:
    """Return the shape of a Llama with tied embeddings and 32,000 tokens."""
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
SHAPES["tiny"] = llama(64, 2, 2, 1, 96)  # for smoke tests; says nothing


class RandomWeights(Mapping[str, Floats]):
    """Weights of any shape, drawn when asked for; those of layers ternary if asked for."""

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
                if has_part(layer, name)
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


def draw(engine: NativeEngine, n: int) -> Tokens:
    """Any `n` tokens."""
    return np.random.default_rng(n).integers(0, engine.config.vocab_size, n).astype(np.int32)


def step_times(
    engine: NativeEngine, sizes: tuple[int, ...], repeat: int, context: int
) -> dict[int, float]:
    """Median seconds of a pass over n nodes; sizes are interleaved."""
    sequence = engine.start(draw(engine, context))
    times: dict[int, list[float]] = {n: [] for n in sizes}
    for _ in range(repeat + 1):
        for n in sizes:
            tree = TokenTree.chain(draw(engine, n))
            start = time.perf_counter()
            engine.forward([(sequence, tree)])
            times[n].append(time.perf_counter() - start)
    engine.release(sequence)
    return {n: statistics.median(values[1:]) for n, values in times.items()}


def prompt_time(engine: NativeEngine, length: int, repeat: int) -> float:
    """Median seconds of a pass over a prompt without logits."""
    times = []
    for _ in range(repeat):
        sequence = engine.open()
        tree = TokenTree.chain(draw(engine, length))
        start = time.perf_counter()
        engine.forward([(sequence, tree)], "none")
        times.append(time.perf_counter() - start)
        engine.release(sequence)
    return statistics.median(times)


def profiled(engine: NativeEngine, sequence: Cached, n: int, repeat: int) -> dict[str, Spent]:
    """Part of a pass over n nodes -> what it took, on average."""
    tree = TokenTree.chain(draw(engine, n))
    engine.forward([(sequence, tree)])
    engine.profiling = True
    for _ in range(repeat):
        engine.forward([(sequence, tree)])
    engine.profiling = False
    return {
        name: Spent(*(value / repeat for value in spent))
        for name, spent in engine.profile().items()
    }


def profile(engine: NativeEngine, sizes: tuple[int, ...], repeat: int, context: int) -> None:
    """Measure and print where the time of passes goes."""
    sequence = engine.start(draw(engine, context))
    most = {
        name: spent.macs / spent.seconds / 1e9
        for name, spent in profiled(engine, sequence, MANY, 2).items()
        if spent.macs
    }
    bandwidth = _native.read_bandwidth(engine.threads) / 1e9
    for n in sizes:
        parts = profiled(engine, sequence, n, repeat)
        whole = sum(spent.seconds for spent in parts.values())
        print(f"\nn = {n}, {context} positions before: {whole * 1e6:.0f} us a pass")
        print(f"part            us  share  waiting  GB/s of {bandwidth:4.1f}  GMAC/s of")
        for name, spent in parts.items():
            seconds = spent.seconds or 1e-9
            waiting = max(0.0, 1 - spent.busy / seconds / engine.threads)
            line = f"{name:10} {seconds * 1e6:7.0f} {seconds / whole:6.1%} {waiting:8.0%}"
            if spent.macs:
                line += f" {spent.bytes / seconds / 1e9:13.1f}"
                line += f" {spent.macs / seconds / 1e9:8.1f} {most[name]:5.1f}"
            print(line)
    engine.release(sequence)


def report(
    engine: NativeEngine, shape: str, sizes: tuple[int, ...], repeat: int, context: int
) -> None:
    """Measure and print one table."""
    before = _native.read_bandwidth(engine.threads)
    times = step_times(engine, sizes, repeat, context)
    bandwidth = max(before, _native.read_bandwidth(engine.threads)) / 1e9
    rate = engine.weight_bytes / times[sizes[0]] / 1e9
    print(
        f"{shape} {engine.format} {engine.isa}, {engine.threads} threads, "
        f"{context} positions in {engine.kv_format}: "
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
    parser.add_argument("--model", help="a checkpoint instead of a shape; --format auto by default")
    parser.add_argument("--format", action="append", help="one of FORMATS, or with :head=FORMAT")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--isa", default="")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--context", type=int, default=64, help="positions before the pass")
    parser.add_argument("--kv-format", choices=KV_FORMATS, default="fp32")
    parser.add_argument("--profile", action="store_true", help="where the time goes")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--prompt", type=int, nargs="+", default=())
    options = parser.parse_args()
    model = load(options.model) if options.model else None
    for shape in [model.name] if model else options.shape or SHAPES:
        for storage in options.format or (["auto"] if model else FORMATS):
            config = model.config if model else SHAPES[shape]
            weights = (
                model.weights if model else RandomWeights(config, storage.startswith("ternary"))
            )
            engine = NativeEngine(
                config, weights, options.threads, storage, options.isa, options.kv_format
            )
            sizes = tuple(options.sizes)
            report(engine, shape, sizes, options.repeat, options.context)
            for length in options.prompt:
                seconds = prompt_time(engine, length, 3)
                print(f"prompt of {length}: {length / seconds:.0f} tokens/s")
            if options.profile:
                profile(engine, sizes, options.repeat, options.context)
            del engine


if __name__ == "__main__":
    main()
