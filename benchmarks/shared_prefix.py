"""What a pass over sequences with one beginning takes, if they share its pages and if they do not.

    python benchmarks/shared_prefix.py [--shape 135m] [--format int8] [--context 1000]
        [--sequences 8] [--nodes 1 8] [--threads N] [--kv-format fp32]

Forks share pages, and attention reads them once for all; sequences that were run apart do not. The
floor is what is read of cache and matrices, at the speed of plain reading. Medians, interleaved;
the time on all cores is the processor's, which neighbours disturb less.

Random weights say nothing about quality; the time of a pass does not depend on them.
"""

from __future__ import annotations

import argparse
import statistics
import time

from step import SHAPES, RandomWeights, draw

from paceline import _native
from paceline.core import TokenTree
from paceline.engines.base import Cached
from paceline.engines.native import KV_FORMATS, NativeEngine, default_threads


def measure(
    engine: NativeEngine, groups: dict[str, list[Cached]], nodes: int, repeat: int
) -> dict[str, tuple[float, ...]]:
    """Name -> medians: seconds of a pass, on all cores, of attention on all cores; bytes read."""
    tree = TokenTree.chain(draw(engine, nodes))
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in groups}
    for _ in range(repeat + 1):
        for name, sequences in groups.items():
            engine.profiling = True
            start, cpu = time.perf_counter(), time.process_time()
            engine.forward([(sequence, tree) for sequence in sequences])
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            profile = engine.profile()
            read = sum(spent.bytes for spent in profile.values())
            times[name].append((seconds, cpu, profile["attention"].busy, read))
    engine.profiling = False
    return {
        name: tuple(statistics.median(column) for column in zip(*rows[1:], strict=True))
        for name, rows in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--format", default="int8", dest="storage")
    parser.add_argument("--kv-format", choices=KV_FORMATS, default="fp32")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--nodes", type=int, nargs="+", default=(1, 8))
    parser.add_argument("--repeat", type=int, default=9)
    options = parser.parse_args()
    config = SHAPES[options.shape]
    engine = NativeEngine(
        config,
        RandomWeights(config),
        options.threads,
        options.storage,
        kv_format=options.kv_format,
    )
    text = draw(engine, options.context)
    first = engine.start(text)
    groups = {
        "apart": [engine.start(text) for _ in range(options.sequences)],
        "shared": [first, *(engine.fork(first) for _ in range(options.sequences - 1))],
    }
    bandwidth = _native.read_bandwidth(engine.threads)
    print(
        f"{options.shape} {engine.format}, {options.sequences} sequences of {options.context} "
        f"positions in {engine.kv_format}, {engine.threads} threads, {bandwidth / 1e9:.1f} GB/s"
    )
    print("nodes  pages   pass ms  on all cores  attention  floor")
    for nodes in options.nodes:
        found = measure(engine, groups, nodes, options.repeat)
        for name, (seconds, cpu, attention, read) in found.items():
            floor = read / bandwidth
            print(
                f"{nodes:5d}  {name:6} {seconds * 1e3:8.1f} {cpu * 1e3:13.1f} "
                f"{attention * 1e3:10.1f} {floor * 1e3:6.1f}"
            )
        ratios = [a / b for a, b in zip(found["apart"], found["shared"], strict=True)]
        print("ratio         " + "{:8.2f} {:13.2f} {:10.2f} {:6.2f}".format(*ratios))


if __name__ == "__main__":
    main()
