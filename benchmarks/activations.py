"""Activations of 8 bits beside 16: T(n), prompts, and what the rounding costs, on one GGUF file.

    python benchmarks/activations.py FILE.gguf [--threads 2] [--rounds 7]
        [--text FILE.jsonl.xz --documents 8]

One engine multiplies with both in turns; medians. With `--text`, the first documents of a file of
{"text": ...} lines are read with both: the norm of the difference of the logits by that of the
logits, positions with the same first choice, and the mean difference of a token's surprise in
nats, with its standard error (positive: 8 bits are worse).
"""

from __future__ import annotations

import argparse
import json
import lzma
import time
from statistics import median

import numpy as np

from paceline.core import Floats, Tokens, TokenTree
from paceline.engines.byte_activations import KINDS
from paceline.engines.native import NativeEngine, default_threads
from paceline.models import Model, load

SIZES = (1, 2, 3, 4, 6, 8, 9, 12, 16, 24, 32)
PROMPT = 512  # tokens
CONTEXT = 64  # cached before a pass
POSITIONS = 192  # of a document
BITS = {16: [], 8: KINDS}  # kinds of products with 8 bits


def pass_times(engine: NativeEngine, rounds: int) -> dict[tuple[int, int], float]:
    """Return median seconds by (bits, nodes of a pass); a prompt is under `PROMPT`."""
    prompt = min(PROMPT, engine.config.context - CONTEXT)
    draw = np.random.default_rng(0).integers(0, engine.config.vocab_size, prompt).astype(np.int32)
    cached = engine.start(draw[:CONTEXT])
    times: dict[tuple[int, int], list[float]] = {}
    for _ in range(rounds + 1):
        for size in (*SIZES, PROMPT):
            for bits, kinds in BITS.items():
                engine._model.set_byte_activations(kinds)
                whole = size == PROMPT
                sequence = engine.open() if whole else cached
                batch = [(sequence, TokenTree.chain(draw[:size]))]
                start = time.perf_counter()
                engine.forward(batch, "none" if whole else "all")
                times.setdefault((bits, size), []).append(time.perf_counter() - start)
                if whole:
                    engine.release(sequence)
    engine.release(cached)
    return {key: median(seconds[1:]) for key, seconds in times.items()}


def report_times(engine: NativeEngine, rounds: int) -> None:
    """Print T(n) for both, and the speed of a prompt."""
    times = pass_times(engine, rounds)
    print("| n | 16 bits, ms | T(n) | 8 bits, ms | T(n) | times as fast |")
    print("|---:|---:|---:|---:|---:|---:|")
    for size in SIZES:
        wide, narrow = times[16, size], times[8, size]
        print(
            f"| {size} | {wide * 1e3:.2f} | {wide / times[16, 1]:.2f} | {narrow * 1e3:.2f} "
            f"| {narrow / times[8, 1]:.2f} | {wide / narrow:.2f} |"
        )
    prompt = min(PROMPT, engine.config.context - CONTEXT)
    wide, narrow = prompt / times[16, PROMPT], prompt / times[8, PROMPT]
    print(f"prompt of {prompt}: {wide:.0f} and {narrow:.0f} tokens/s, {narrow / wide:.2f} times")


def surprises(logits: Floats, ids: Tokens) -> Floats:
    """Return the nats of every token but the first, given logits [S, V]."""
    shifted = logits - logits.max(1, keepdims=True)
    chosen = shifted[np.arange(len(ids) - 1), ids[1:]]
    return np.asarray(np.log(np.exp(shifted[:-1]).sum(1)) - chosen)


def report_quality(engine: NativeEngine, texts: list[Tokens]) -> None:
    """Print what 8 bits change on some texts."""
    errors, same, nats = [], [], []
    for ids in texts:
        read: dict[int, Floats] = {}
        for bits, kinds in BITS.items():
            engine._model.set_byte_activations(kinds)
            sequence = engine.open()
            read[bits] = engine.forward([(sequence, TokenTree.chain(ids))]).copy()
            engine.release(sequence)
        missed = np.linalg.norm(read[8] - read[16], axis=1)
        errors.extend(missed / np.linalg.norm(read[16], axis=1))
        same.extend(read[8].argmax(1) == read[16].argmax(1))
        nats.extend(surprises(read[8], ids) - surprises(read[16], ids))
    print(
        f"{len(errors)} positions: logits differ by {np.mean(errors):.4f} of their norm (median "
        f"{np.median(errors):.4f}), first choices agree in {np.mean(same):.2%}, "
        f"{np.mean(nats):+.4f} +- {np.std(nats) / len(nats) ** 0.5:.4f} nats a token"
    )


def read_texts(model: Model, path: str, count: int) -> list[Tokens]:
    """Return the tokens of the first documents that are long enough."""
    with lzma.open(path, "rt") as lines:
        texts = (json.loads(line)["text"] for line in lines)
        long = (text for text in texts if len(text) > 6 * POSITIONS)
        chosen = [next(long) for _ in range(count)]
    return [np.array(model.tokenizer.encode(text)[:POSITIONS], np.int32) for text in chosen]


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--isa", default="")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--text")
    parser.add_argument("--documents", type=int, default=8)
    options = parser.parse_args()
    model = load(options.model)
    engine = NativeEngine(model.config, model.weights, options.threads, "auto", options.isa)
    print(f"{engine.format}, {engine.isa}, {engine.threads} threads")
    if options.text:
        report_quality(engine, read_texts(model, options.text, options.documents))
    else:
        report_times(engine, options.rounds)


if __name__ == "__main__":
    main()
