"""The kernels alone: GB/s and GMAC/s of one matrix, beside what the machine can do.

    python benchmarks/kernels.py [--shape 135m|1.1b] [--format int8] [--threads 2] [--isa NAME]

A matrix has the inputs of one of the model's matrices and as many rows as fill several times the
largest cache, so every pass reads it from memory: what a row costs depends on its inputs alone. It
runs as the head of a model without layers, the only product that the engine offers by itself; a
norm and the lookup of n embeddings, both tiny beside it, are timed with it. What short matrices and
everything between them add shows in `step.py`.

Ceilings, measured in the same rounds: reading memory by all threads, and multiply-adds by torch's
own matrix products (MKL, oneDNN) of 1024 x 1024 x 1024, which come near the processor's best: in
fp32, which all our float formats multiply in, and of int8 by int8. Ours multiplies int8 weights by
int16 activations, half as many in an instruction. `in cache` is our own kernel with a matrix that
fits the second-level cache, 512 tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median
from time import perf_counter

import numpy as np
from step import SHAPES, RandomWeights

from paceline import _native
from paceline.core import TokenTree
from paceline.engines.native import FORMATS, NativeEngine, default_threads
from paceline.measuring.bandwidth import largest_cache
from paceline.models.config import ModelConfig

SIZES = (1, 2, 4, 8, 16, 32, 128, 512)
BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "int4": 4}
SMALL = 1 << 19  # bytes of a matrix that stays in cache
EDGE = 1024  # of torch's matrices


def matrix(shape: ModelConfig, inputs: int, size: int, bits: int) -> ModelConfig:
    """A model without layers whose head has `inputs` and fills about `size` bytes."""
    rows = max(size * 8 // (bits * inputs) // 64 * 64, 64)
    return replace(shape, hidden_size=inputs, vocab_size=rows, layers=())


def passes(engine: NativeEngine, sizes: tuple[int, ...]) -> dict[int, Callable[[], object]]:
    """A pass of each size over no cached token."""
    sequence = engine.open()
    draw = np.random.default_rng(0).integers(0, engine.config.vocab_size, max(sizes))
    trees = {n: TokenTree.chain(draw[:n].astype(np.int32)) for n in sizes}
    return {n: lambda tree=tree: engine.forward([(sequence, tree)]) for n, tree in trees.items()}


def rounds(jobs: Mapping[object, Callable[[], object]], count: int) -> dict[object, float]:
    """Median seconds of each job; they take turns, and the first turn does not count."""
    times: dict[object, list[float]] = {key: [] for key in jobs}
    for _ in range(count + 1):
        for key, job in jobs.items():
            start = perf_counter()
            job()
            times[key].append(perf_counter() - start)
    return {key: median(seconds[1:]) for key, seconds in times.items()}


def ceilings(threads: int, count: int) -> dict[str, float]:
    """Multiply-adds per second of torch's products; empty without torch."""
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(threads)
    floats = [torch.randn(EDGE, EDGE) for _ in range(2)]
    bytes_ = [torch.randint(-99, 99, (EDGE, EDGE), dtype=torch.int8) for _ in range(2)]
    jobs = {
        "torch fp32": lambda: torch.mm(*floats),
        "torch int8": lambda: torch._int_mm(*bytes_),
    }
    return {str(key): EDGE**3 / seconds for key, seconds in rounds(jobs, count).items()}


def report(shape: ModelConfig, inputs: int, storage: str, options: argparse.Namespace) -> list[str]:
    """Two rows of the table, GB/s and GMAC/s."""
    threads, bits = options.threads, BITS[storage]
    large = max(128 << 20, 4 * largest_cache())
    engines = [
        NativeEngine(config, RandomWeights(config), threads, storage, options.isa)
        for config in (matrix(shape, inputs, size, bits) for size in (large, SMALL))
    ]
    jobs: dict[object, Callable[[], object]] = dict(passes(engines[0], SIZES))
    jobs["in cache"] = passes(engines[1], (max(SIZES),))[max(SIZES)]
    reads = [_native.read_bandwidth(threads)]
    times = rounds(jobs, options.rounds)
    reads.append(_native.read_bandwidth(threads))
    read = median(reads)
    gigabytes = [engines[0].bytes / times[n] for n in SIZES]
    products = [n * engines[0].parameters / times[n] / 1e9 for n in SIZES]
    cached = max(SIZES) * engines[1].parameters / times["in cache"] / 1e9
    name = f"{storage} {engines[0].isa}, {inputs} inputs"
    return [
        _row([name, "GB/s", *(f"{g / 1e9:.1f} ({g / read:.0%})" for g in gigabytes), ""]),
        _row([name, "GMAC/s", *(f"{p:.1f}" for p in products), f"{cached:.1f}"]),
    ]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Parse the command line, measure, print one table for each shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--format", choices=FORMATS, action="append")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--isa", default="")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    read = _native.read_bandwidth(options.threads) / 1e9
    known = ceilings(options.threads, options.rounds)
    print(f"{options.threads} threads; memory: {read:.1f} GB/s (shares are of the speed beside it)")
    print(
        "multiply-adds:", ", ".join(f"{name} {rate / 1e9:.0f} G/s" for name, rate in known.items())
    )
    for name in options.shape or SHAPES:
        shape = SHAPES[name]
        print(f"\n**{name}**\n")
        print(_row(["matrix", "", *(f"n = {n}" for n in SIZES), "in cache"]))
        print(_row(["---", "---", *["---:"] * (len(SIZES) + 1)]))
        for storage in options.format or FORMATS:
            for inputs in (shape.hidden_size, shape.layers[0].intermediate):
                print(*report(shape, inputs, storage, options), sep="\n", flush=True)


if __name__ == "__main__":
    main()
