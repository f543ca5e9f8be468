"""Decode speed where attention reads few of the cached positions, in turns with reading all.

For each length each engine gets a cache, then tokens are decoded one by one, a few at a time, in
turns. The floor of a pattern is the share of bytes that it must read: weights, the chosen keys
and values, and what it chooses by.

    python benchmarks/sparse_attention.py MODEL --lengths 4096 8192 --patterns quest:summary=mean
"""

from __future__ import annotations

import argparse
import math
import statistics
from time import perf_counter

import numpy as np

from paceline.core import TokenTree
from paceline.engines import open_engine
from paceline.engines.few_read import RUN, HeadRead
from paceline.engines.pages import PAGE
from paceline.models import load
from paceline.registry import patterns

_REAL = 512


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
        row_bytes = engines[0].position_bytes
        whole = read_bytes(engines[0], length, row_bytes)
        for spec, engine, each in zip(specs, engines, times, strict=True):
            low, middle = min(each), statistics.median(each)
            bound = whole / read_bytes(engine, length, row_bytes)
            print(
                f"{length:6d}  {spec or 'full':40s} {low * 1e3:7.2f} ms  median {middle * 1e3:7.2f}"
                f"  {full / low:5.2f}x  by bytes {bound:5.2f}x",
                flush=True,
            )
        for engine, sequence in zip(engines, sequences, strict=True):
            engine.release(sequence)


def read_bytes(engine, length: int, row_bytes: float) -> float:
    """Return the bytes that a token needs: weights, keys and values, and summaries.

    Query heads that choose apart are counted as if they chose the same positions.
    """
    if engine.pattern is None:
        return engine.weight_bytes + length * row_bytes
    rule, config = engine.pattern.few_read, engine.config
    own = {"representatives": rule.representatives + 1, "centroids": rule.clusters * RUN}
    summaries = {"none": 0, "mean": 1, "bounds": 2, "spread": 2, **own}[rule.summary]
    row = sum(2 * layer.kv_heads * layer.head_dim for layer in config.layers)
    runs = max(rule.least, math.ceil(rule.share * length / RUN))
    read = 0.0
    for layer, heads in zip(config.layers, engine.pattern.head_reads(engine), strict=True):
        for head in heads:
            part = layer.head_dim * 2 / row
            near = min(length, (rule.sinks + rule.local) * RUN)
            rows = {
                HeadRead.ALL: length,
                HeadRead.NEAR: near,
                HeadRead.CHOSEN: max(near, min(length, runs * RUN)),
            }[head]
            if rule.top_k and head == HeadRead.CHOSEN:
                rows = (length + rows) / 2
            chooses = head == HeadRead.CHOSEN
            read += part * row_bytes * rows
            read += chooses * summaries * layer.head_dim * 4 * length / RUN
    return engine.weight_bytes + read


def fill(engine, sequence, ids) -> None:
    """Fill a cache with rows like real ones, without the time that a long prompt takes.

    The first `_REAL` positions are run; their pages come again, in fp32 with noise, so that runs
    are chosen all over the text.
    """
    engine.set_prompt(sequence, len(ids))
    real = min(len(ids), _REAL) // PAGE * PAGE
    engine.extend(sequence, ids[:real])
    rng = np.random.default_rng(1)
    pages = [engine.read_page(sequence, page) for page in range(real // PAGE)]
    while pages and sequence.length + PAGE <= len(ids):
        page = pages[rng.integers(len(pages))].copy()
        if engine.kv_format == "fp32":
            page.view(np.float32)[:] *= rng.normal(1, 0.3, page.nbytes // 4).astype(np.float32)
        engine.append_page(sequence, page)
    engine.extend(sequence, ids[sequence.length :])


if __name__ == "__main__":
    main()
