"""Time to read a prompt where blocks choose what they read, in turns with reading all, and loss.

For each length the prompt is a part of a book. The loss is the difference in nats a token between
a prompt that reads some blocks and one that reads all, behind its first 1,024 tokens.

    python benchmarks/sparse_prefill.py MODEL [--lengths 4096 8191] [--patterns block_sparse ...]
        [--data FOLDER] [--rounds 2] [--loss] [--threads 2]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter

import numpy as np

from paceline.engines import open_engine
from paceline.measuring.evaluation.data import find_file, is_text, read_rows
from paceline.models import load
from paceline.registry import patterns
from paceline.scoring import token_logprobs

SHARED = Path(__file__).resolve().parents[2] / "shared"
_SKIPPED = 1024  # first tokens, which read nearly everything


def main() -> None:
    """Print a table of seconds and losses."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8191])
    parser.add_argument("--patterns", nargs="+", default=["block_sparse"])
    parser.add_argument("--data", type=Path, default=SHARED / "text")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--kv-format", default="fp32")
    parser.add_argument("--loss", action="store_true", help="measure losses instead of times")
    args = parser.parse_args()
    model = load(args.model)
    specs = [None, *args.patterns]
    engines = [
        open_engine(
            model,
            "native",
            threads=args.threads,
            kv_format=args.kv_format,
            pattern=None if spec is None else patterns.parse(spec),
        )
        for spec in specs
    ]
    print(f"{model.name}, {engines[0].format}, kv {args.kv_format}, {engines[0].threads} threads")
    path = find_file(args.data, "long", "long*.jsonl", "*books*.jsonl", "*.jsonl")
    books = [row["text"] for row in read_rows(path, {"text": is_text})]
    for length in args.lengths:
        text = max(books, key=len)[: 8 * length]
        ids = np.array(model.tokenizer.encode(text, False)[:length], np.int32)
        found = [[] for _ in specs]
        for _ in range(1 if args.loss else args.rounds):
            for each, engine in zip(found, engines, strict=True):
                each.append(nats(engine, ids) if args.loss else seconds(engine, ids))
        for spec, each in zip(specs, found, strict=True):
            if args.loss:
                gaps = each[0] - found[0][0]
                error = gaps.std() / np.sqrt(len(gaps))
                line = f"{each[0].mean():.4f} nats  {gaps.mean():+.4f} +- {error:.4f}"
            else:
                line = f"{min(each):.2f} s  {min(found[0]) / min(each):.2f}x"
            print(f"{len(ids):6d}  {spec or 'full':40s} {line}", flush=True)


def seconds(engine, ids) -> float:
    """Return how long it takes to read a prompt."""
    begun = perf_counter()
    engine.release(engine.start(ids, prompt=True))
    return perf_counter() - begun


def nats(engine, ids) -> np.ndarray:
    """Return the negative log-probability of each token behind the first ones of a prompt."""
    rows = []

    def observe(offset, tree, logits):
        following = ids[offset + 1 : offset + 1 + len(tree)]
        rows.append(-token_logprobs(logits[: len(following)], following))

    engine.release(engine.start(ids, observe, prompt=True))
    return np.concatenate(rows)[min(_SKIPPED, len(ids) // 2) :]


if __name__ == "__main__":
    main()
