"""Formats of cached keys and values: the time of a plain step on long contexts, and their loss.

    python benchmarks/kv_formats.py MODEL [--formats fp32 int8 int4] [--contexts 4096 8192]
        [--threads 2] [--rounds 30] [--text FILE.jsonl.xz --documents 4 --positions 2048]
    python benchmarks/kv_formats.py MODEL --engine reference --contexts --text FILE.jsonl.xz

All formats take turns; medians. A context is filled with copies of one computed page, whose
contents do not matter for the time. The floor is what a step reads of keys and values, at the speed
of plain reading. With `--text`, the first positions of documents, {"text": ...} lines, are read in
every format: the mean difference of a token's surprise to the first format in nats, paired, with
its standard error (positive: worse), and the bits of a number. In the reference engine formats are
`auto`, int4, int3 and gear, by default those of `GEAR_FORMS`: KIVI and GEAR at many sizes, which
all leave the same positions exact.
"""

from __future__ import annotations

import argparse
import json
import lzma
import time
from collections.abc import Callable
from statistics import median
from typing import cast

import numpy as np
from numpy.typing import NDArray

from paceline import _native
from paceline.core import Floats, Tokens, TokenTree
from paceline.engines.base import Engine
from paceline.engines.factory import open_engine
from paceline.engines.kv_formats import grouped_format
from paceline.engines.native import KV_FORMATS, NativeEngine, default_threads
from paceline.engines.pages import PAGE
from paceline.models import Model, load

Surprises = NDArray[np.float64]
Opener = Callable[[str], Engine]

_KIVI = "rank=0,outliers=0"
GEAR_FORMS = (
    "auto",
    *(f"gear:bits={bits},group={group},{_KIVI}" for bits in (4, 3, 2) for group in (32, 64, 0)),
    *(f"gear:bits={bits},rank=0" for bits in (4, 3, 2)),
    *(f"gear:bits={bits},rank=2,outliers=0" for bits in (4, 3, 2)),
    *(f"gear:bits={bits},rank=1" for bits in (3, 2)),
    *(f"gear:bits={bits}" for bits in (4, 3, 2)),
)


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


def surprises(engine: Engine, ids: Tokens) -> Surprises:
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


def number_bits(engine: Engine) -> float:
    """Return the bits of a cached number, in the mean over layers."""
    form = grouped_format(engine.kv_format)
    layers = [each for each in engine.config.layers if each.heads]
    numbers = [2 * each.kv_heads * each.head_dim for each in layers]
    if form is None or isinstance(engine, NativeEngine):
        return 8 * engine.memory.page_bytes / PAGE / sum(numbers)
    bits = [form.number_bits(each.kv_heads, each.head_dim) for each in layers]
    return float(np.average(bits, weights=numbers))


def report_loss(
    model: Model, open_one: Opener, formats: list[str], path: str, documents: int, positions: int
) -> None:
    """Print what each format loses on the beginnings of documents."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for _, line in zip(range(documents), lines, strict=False)]
    limit = min(positions, model.config.context)
    prompts = [np.array(model.tokenizer.encode(text)[:limit], np.int32) for text in texts]
    base: Surprises | None = None
    for name in formats:
        engine = open_one(name)
        values = np.concatenate([surprises(engine, ids) for ids in prompts])
        if base is None:
            base = values
            print(f"{len(base)} tokens, {base.mean():.4f} nats with {name}")
            print("| format | bits a number | nats a token | standard error |")
            print("|---|---:|---:|---:|")
        apart = values - base
        error = apart.std() / len(apart) ** 0.5
        bits = number_bits(engine)
        print(f"| {name} | {bits:.2f} | {apart.mean():+.5f} | {error:.5f} |", flush=True)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--engine", default="native", choices=("native", "reference"))
    parser.add_argument("--formats", nargs="+", help="default: all of the engine")
    parser.add_argument("--contexts", nargs="*", type=int, help="none: no times; default 4096 8192")
    parser.add_argument("--format", default="auto", help="of weights")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--text")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--positions", type=int, default=2048)
    arguments = parser.parse_args()
    model, native = load(arguments.model), arguments.engine == "native"
    formats = arguments.formats or list(KV_FORMATS if native else GEAR_FORMS)
    contexts = [4096, 8192] if arguments.contexts is None else arguments.contexts
    if contexts and not native:
        parser.error("times are of the native engine; add --contexts without a number")

    def open_one(name: str) -> Engine:
        return open_engine(
            model,
            arguments.engine,
            threads=arguments.threads if native else None,
            weight_format=arguments.format,
            kv_format=name,
        )

    if contexts:
        engines = {name: cast(NativeEngine, open_one(name)) for name in formats}
        report_times(engines, contexts, arguments.rounds)
        del engines
    if arguments.text:
        documents, positions = arguments.documents, arguments.positions
        report_loss(model, open_one, formats, arguments.text, documents, positions)


if __name__ == "__main__":
    main()
