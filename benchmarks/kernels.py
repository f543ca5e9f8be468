"""The kernels alone: GB/s and GMAC/s of one matrix, beside what the machine can do.

    python benchmarks/kernels.py [--shape 135m|1.1b] [--format int8] [--threads 2] [--isa NAME]

A matrix has the inputs of one of the model's matrices: what a row costs depends on its inputs
alone. For up to 16 tokens it has as many rows as fill three times the largest cache, so every pass
reads it from memory; for more, where arithmetic decides, it has 4,096. It runs as the head of a
model of one layer, the smallest there is: the layer's matrices, a norm and the lookup of n
embeddings, all tiny beside it, are timed with it. What short matrices and everything between them
add shows in `step.py`.

Ceilings: reading memory by all threads, measured before and after each row of the table, and
multiply-adds by torch's own matrix products (MKL, oneDNN) of 1024 x 1024 x 1024, measured once,
which come near the processor's best: in fp32, which all our float formats multiply in, and of int8
by int8. Ours multiplies int8 weights by int16 activations, half as many in an instruction.
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
from paceline.engines.formats import BITS, HEADS
from paceline.engines.native import NativeEngine, default_threads
from paceline.machine import largest_cache
from paceline.models.config import LayerConfig, ModelConfig

SIZES = (1, 2, 4, 8, 16, 32, 128, 512)
FEW = 16  # tokens up to which reading the matrix may decide
ROWS = 4096  # of the matrix for more: its outputs stay in cache, as in a model
EDGE = 1024  # of torch's matrices


def matrix(shape: ModelConfig, inputs: int, rows: int) -> ModelConfig:
    """Return a model of the smallest layer, whose head is [rows, inputs]."""
    smallest = LayerConfig(heads=1, kv_heads=1, head_dim=32, intermediate=32)
    return replace(shape, hidden_size=inputs, vocab_size=rows, layers=(smallest,))


def passes(engine: NativeEngine, sizes: tuple[int, ...]) -> dict[int, Callable[[], object]]:
    """Return a pass of each size over no cached token."""
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
    threads = options.threads
    size = options.megabytes << 20 if options.megabytes else max(96 << 20, 3 * largest_cache())
    tall = int(size * 8 / (BITS[storage] * inputs))
    few = tuple(n for n in SIZES if n <= FEW)
    many = tuple(n for n in SIZES if n > FEW)
    engines: dict[int, NativeEngine] = {}
    jobs: dict[object, Callable[[], object]] = {}
    for rows, sizes in ((tall, few), (ROWS, many)):
        config = matrix(shape, inputs, rows)
        engine = NativeEngine(config, RandomWeights(config), threads, storage, options.isa)
        engines |= dict.fromkeys(sizes, engine)
        jobs |= passes(engine, sizes)
    reads = [_native.read_bandwidth(threads)]
    times = rounds(jobs, options.rounds)
    reads.append(_native.read_bandwidth(threads))
    read = median(reads)
    gigabytes = [engines[n].weight_bytes / times[n] for n in few]
    products = [n * engines[n].parameters / times[n] / 1e9 for n in SIZES]
    name = f"{storage} {engines[1].isa}, {inputs} inputs"
    shares = [f"{g / 1e9:.1f} ({g / read:.0%})" for g in gigabytes]
    return [
        _row([name, "GB/s", *shares, *[""] * len(many)]),
        _row([name, "GMAC/s", *(f"{p:.1f}" for p in products)]),
    ]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Parse the command line, measure, print one table for each shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--format", choices=HEADS, action="append")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--isa", default="")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, help="size of the tall matrix; default: see above")
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
        print(_row(["matrix", "", *(f"n = {n}" for n in SIZES)]))
        print(_row(["---", "---", *["---:"] * len(SIZES)]))
        for storage in options.format or HEADS:
            for inputs in (shape.hidden_size, shape.layers[0].intermediate):
                print(*report(shape, inputs, storage, options), sep="\n", flush=True)


if __name__ == "__main__":
    main()
