"""Decode speed where attention reads few of the cached positions, in turns with reading all.

For each length the context is read once by each engine, then tokens are decoded one by one, a few
at a time, in turns. Bytes are those of weights, cached keys and values that are read, and
summaries; the floor is their time at the measured bandwidth.

    python benchmarks/sparse_attention.py MODEL --lengths 4096 8192 --patterns quest:summary=mean
"""

from __future__ import annotations

import argparse
import statistics
from time import perf_counter

import numpy as np

from paceline.core import TokenTree
from paceline.engines import open_engine
from paceline.models import load
from paceline.registry import patterns


def main() -> None:
    """Print a table of seconds per token."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8000])
    parser.add_argument("--patterns", nargs="+", default=["quest:summary=mean", "quest"])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--tokens", type=int, default=4, help="tokens of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--format", default="auto")
    parser.add_argument("--kv-format", default="fp32")
    args = parser.parse_args()
    model = load(args.model)
    specs = [None, *args.patterns]
    engines = [
        open_engine(
            model,
            "native",
            threads=args.threads,
            weight_format=args.format,
            kv_format=args.kv_format,
            pattern=None if spec is None else patterns.parse(spec),
        )
        for spec in specs
    ]
    rng = np.random.default_rng(0)
    print(f"{model.name}, {engines[0].format}, kv {args.kv_format}, {engines[0].threads} threads")
    for length in args.lengths:
        ids = rng.integers(0, model.config.vocab_size, length).astype(np.int32)
        sequences = [engine.open() for engine in engines]
        for engine, sequence in zip(engines, sequences, strict=True):
            fill(engine, sequence, ids)
        times: list[list[float]] = [[] for _ in specs]
        for _ in range(args.rounds):
            for place, (engine, sequence) in enumerate(zip(engines, sequences, strict=True)):
                begun = perf_counter()
                for token in ids[: args.tokens]:
                    engine.forward([(sequence, TokenTree.root(int(token)))])
                times[place].append((perf_counter() - begun) / args.tokens)
        full = min(times[0])
        for spec, each in zip(specs, times, strict=True):
            low, middle = min(each), statistics.median(each)
            print(
                f"{length:6d}  {spec or 'full':40s} {low * 1e3:7.2f} ms  median {middle * 1e3:7.2f}"
                f"  {full / low:5.2f}x"
            )
        for engine, sequence in zip(engines, sequences, strict=True):
            engine.release(sequence)


def fill(engine, sequence, ids) -> None:
    """Fill a cache with random rows: what is in them does not matter for speed."""
    engine.set_prompt(sequence, len(ids))
    engine.extend(sequence, ids)


if __name__ == "__main__":
    main()
