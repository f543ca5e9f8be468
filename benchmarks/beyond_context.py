"""Loss of a book beyond the trained context, with scaled positions, beside the plain model.

Each context is the beginning of a book. Of its last 1,024 tokens, and of as many before each other
of `--ends`, it prints the loss in nats a token. `cut` is the plain model that sees the last tokens
its context holds, `unscaled` the plain model whose positions go on. `dual_chunk` runs in the
reference engine, which is slow; the others in the native one.

    python benchmarks/beyond_context.py MODEL [--ends 8192 12288 16384] [--contexts 1]
        [--ropes cut unscaled linear:factor=2 yarn:factor=2 ...] [--data FOLDER] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np

from paceline.core import Tokens
from paceline.engines import open_engine
from paceline.engines.base import Engine
from paceline.measuring.evaluation.data import find_file, is_text, read_rows
from paceline.models import Model, load
from paceline.models.extension import extend_context
from paceline.scoring import token_logprobs

SHARED = Path(__file__).resolve().parents[2] / "shared"
ROPES = ("cut", "unscaled", "linear:factor=2", "yarn:factor=2", "dynamic:factor=2")
_SCORED = 1024  # tokens before each end
_CHUNK = 256


def main() -> None:
    """Print a line for each way and context."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--ends", type=int, nargs="+", default=[8192, 12288, 16384])
    parser.add_argument("--ropes", nargs="+", default=ROPES)
    parser.add_argument("--contexts", type=int, default=1)
    parser.add_argument("--scored", type=int, default=_SCORED, help="tokens before each end")
    parser.add_argument("--data", type=Path, default=SHARED / "text")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    model, ends = load(args.model), sorted(args.ends)
    path = find_file(args.data, "long", "long*.jsonl", "*books*.jsonl", "*.jsonl")
    texts = sorted((row["text"] for row in read_rows(path, {"text": is_text})), key=len)
    for book in texts[: -args.contexts - 1 : -1]:
        ids = np.array(model.tokenizer.encode(book[: 8 * ends[-1]], False)[: ends[-1]], np.int32)
        if len(ids) < ends[-1]:
            raise SystemExit(f"a book has {len(ids)} tokens, expected {ends[-1]}")
        for rope in args.ropes:
            begun = perf_counter()
            found = losses(model, rope, ids, ends, args)
            line = {end: round(loss, 4) for end, loss in zip(ends, found, strict=True)}
            seconds = round(perf_counter() - begun, 1)
            print(json.dumps({"rope": rope, "nats": line, "seconds": seconds}), flush=True)


def losses(
    model: Model, rope: str, ids: Tokens, ends: Sequence[int], args: argparse.Namespace
) -> list[float]:
    """Return the loss of the tokens before each end, nats a token."""
    config, context = model.config, model.config.context
    if rope == "unscaled":
        model = replace(model, config=replace(config, context=max(context, ends[-1])))
    elif rope != "cut":
        model = replace(model, config=extend_context(config, rope))
    name = "reference" if rope.startswith("dual_chunk") else "native"
    threads = None if name == "reference" else args.threads
    engine = open_engine(model, name, threads=threads)
    if rope != "cut":
        nats = read(engine, ids)
        return [float(nats[end - args.scored - 1 : end - 1].mean()) for end in ends]
    parts = [read(engine, ids[max(0, end - context) : end]) for end in ends]
    return [float(nats[-args.scored :].mean()) for nats in parts]


def read(engine: Engine, ids: Tokens) -> np.ndarray:
    """Return the negative log-probability of each token but the first, float64 [S - 1]."""
    rows: list[np.ndarray] = []

    def observe(offset: int, tree: object, logits: np.ndarray) -> None:
        following = ids[offset + 1 : offset + 1 + len(logits)]
        rows.append(-token_logprobs(logits[: len(following)], following))

    sequence = engine.open()
    engine.extend(sequence, ids, observe, _CHUNK)
    engine.release(sequence)
    return np.concatenate(rows)


if __name__ == "__main__":
    main()
