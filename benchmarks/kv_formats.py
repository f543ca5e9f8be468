"""Formats of cached keys and values: the time of a plain step on long contexts, and their loss.

    python benchmarks/kv_formats.py MODEL [--formats fp32 int8 int4] [--contexts 4096 8192]
        [--threads 2] [--rounds 30] [--text FILE.jsonl.xz --documents 4 --positions 2048]

All formats take turns; medians. A context is filled with copies of one computed page, whose
contents do not matter for the time. The floor is what a step reads of keys and values, at the speed
of plain reading. With `--text`, the first positions of documents, {"text": ...} lines, are read in
every format: the mean difference of a token's surprise to fp32 in nats, paired, with its standard
error (positive: worse).
"""

from __future__ import annotations

import argparse
import json
import lzma
import time
from statistics import median

import numpy as np
from numpy.typing import NDArray

from paceline import _native
from paceline.core import Floats, Tokens, TokenTree
from paceline.engines.native import KV_FORMATS, NativeEngine, default_threads
from paceline.engines.pages import PAGE
from paceline.models import Model, load

Surprises = NDArray[np.float64]


def filled(engine: NativeEngine, context: int) -> object:
    """Return a sequence of about `context` positions."""
    sequence = engine.start(np.arange(3, 3 + PAGE, dtype=np.int32))
    page = engine.read_page(sequence, 0)
    while sequence.length + PAGE < min(context, engine.config.context):
        engine.append_page(sequence, page)
    return sequence


def step_times(
    engines: dict[str, NativeEngine], context: int, rounds: int
) -> dict[str, tuple[int, float]]:
    """Return the positions held and the median seconds of a step by format."""
    sequences = {name: filled(engine, context) for name, engine in engines.items()}
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds + 1):
        for name, engine in engines.items():
            batch = [(sequences[name], TokenTree.root(5))]
            start = time.perf_counter()
            engine.forward(batch)
            times[name].append(time.perf_counter() - start)
    found = {name: (sequences[name].length, median(times[name][1:])) for name in engines}
    for name, sequence in sequences.items():
        engines[name].release(sequence)
    return found


def report_times(engines: dict[str, NativeEngine], contexts: list[int], rounds: int) -> None:
    """Print a table of steps."""
    speed = _native.read_bandwidth(next(iter(engines.values())).threads)
    print(f"plain reading: {speed / 1e9:.1f} GB/s")
    print("| positions | format | bits a number | step, ms | times as fast | floor of KV, ms |")
    print("|---:|---|---:|---:|---:|---:|")
    for context in contexts:
        found = step_times(engines, context, rounds)
        slowest = next(iter(found.values()))[1]
        for name, (length, seconds) in found.items():
            engine = engines[name]
            numbers = sum(2 * each.kv_heads * each.head_dim for each in engine.config.layers)
            floor = length * engine.position_bytes / speed
            print(
                f"| {length} | {name} | {8 * engine.position_bytes / numbers:.2f} | "
                f"{1e3 * seconds:.2f} | {slowest / seconds:.2f} | {1e3 * floor:.2f} |"
            )


def surprises(engine: NativeEngine, ids: Tokens) -> Surprises:
    """Return the surprise of each token but the first, in nats."""
    rows: list[Surprises] = []

    def observe(offset: int, tree: TokenTree, logits: Floats) -> None:
        told = ids[offset + 1 : offset + 1 + len(tree)]
        wide = logits[: len(told)].astype(np.float64)
        top = wide.max(1)
        sums = np.log(np.exp(wide - top[:, None]).sum(1)) + top
        rows.append(sums - wide[np.arange(len(told)), told])

    engine.release(engine.start(ids, observe))
    return np.concatenate(rows)


def report_loss(
    model: Model, engines: dict[str, NativeEngine], path: str, documents: int, positions: int
) -> None:
    """Print what each format loses on the beginnings of documents."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for _, line in zip(range(documents), lines, strict=False)]
    limit = min(positions, model.config.context)
    prompts = [np.array(model.tokenizer.encode(text)[:limit], np.int32) for text in texts]
    found = {
        name: np.concatenate([surprises(engine, ids) for ids in prompts])
        for name, engine in engines.items()
    }
    base = next(iter(found.values()))
    print(f"{len(base)} tokens, {base.mean():.4f} nats")
    for name, values in found.items():
        apart = values - base
        error = apart.std() / len(apart) ** 0.5
        print(f"{name}: {apart.mean():+.5f} nats a token, standard error {error:.5f}")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--formats", nargs="+", default=list(KV_FORMATS), choices=KV_FORMATS)
    parser.add_argument("--contexts", nargs="*", type=int, default=[4096, 8192])
    parser.add_argument("--format", default="auto", help="of weights")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--text")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--positions", type=int, default=2048)
    arguments = parser.parse_args()
    model = load(arguments.model)
    engines = {
        name: NativeEngine(
            model.config,
            model.weights,
            threads=arguments.threads,
            format=arguments.format,
            kv_format=name,
        )
        for name in arguments.formats
    }
    if arguments.contexts:
        report_times(engines, arguments.contexts, arguments.rounds)
    if arguments.text:
        report_loss(model, engines, arguments.text, arguments.documents, arguments.positions)


if __name__ == "__main__":
    main()
