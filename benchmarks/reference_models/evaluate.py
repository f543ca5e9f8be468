"""Measure a model of the family with Paceline's own engine and write its card.

    python -m benchmarks.reference_models.evaluate build/reference/30m/export

Bits per byte of each held-out source, BLiMP, LAMBADA and samples go into results.json, README.md
and two plots in the model's folder. `--format int8` prints what that format of the weights gives
and writes nothing.
"""

import argparse
import gzip
import json
import math
import sys
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reference_models.card import write_card
from benchmarks.reference_models.sources import SHARED, SOURCES, read
from paceline import LM
from paceline.machine import commit, machine
from paceline.measuring.perplexity import predict

PROMPTS = ("The city of Paris", "Once upon a time", "def fibonacci(n):\n")
QUESTION = "Tom has 3 apples and buys 5 more. How many apples does Tom have?"
SAMPLE_TOKENS = 120


def held_out(shared: Path, most: int) -> dict[str, list[str]]:
    """Source -> its validation documents, up to `most` bytes of them; the last may be cut."""
    return {name: cut(read(name, shared)[1], most) for name in SOURCES}


def cut(documents: list[str], most: int) -> list[str]:
    """Return the first `most` bytes of documents, less what would be half a character."""
    kept, left = [], most
    for document in documents:
        data = document.encode()[:left]
        left -= len(data)
        if data:
            kept.append(data.decode(errors="ignore"))
    return kept


def bits_per_byte(lm: LM, texts: list[str]) -> dict[str, float]:
    """Bits per byte of texts, in windows of the context less one, each without a past."""
    ids = [(lm.tokenizer.encode(each, special=False), len(each.encode())) for each in texts]
    found = predict(lm.engine, ids, _start(lm), lm.engine.config.context - 1)
    return {
        "bits_per_byte": round(found.bits_per_byte, 4),
        "bytes": found.bytes,
        "tokens": found.tokens,
    }


def _start(lm: LM) -> int:
    bos, eos = lm.engine.config.bos, lm.engine.config.eos
    return eos[0] if bos is None else bos


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def blimp(lm: LM, path: Path, pairs: int) -> dict[str, Any]:
    """Share of minimal pairs whose grammatical sentence is likelier: the first of each paradigm."""

    def nats(sentence: str) -> float:
        ids = lm.tokenizer.encode(sentence, special=False)
        return predict(lm.engine, [(ids, 1)], _start(lm), len(ids)).nats

    right: dict[str, list[bool]] = {}
    for _, paradigm in groupby(_lines(path), lambda row: row["UID"]):
        for row in islice(paradigm, pairs):
            better = nats(row["sentence_good"]) < nats(row["sentence_bad"])
            right.setdefault(row["linguistics_term"], []).append(better)
    phenomena = {name: round(sum(each) / len(each), 4) for name, each in sorted(right.items())}
    return share([one for each in right.values() for one in each]) | {"phenomena": phenomena}


def lambada(lm: LM, path: Path, passages: int) -> dict[str, Any]:
    """Share of passages whose last word is the model's first choice, token by token."""
    right = []
    for row in islice(_lines(path), passages):
        before, _, word = row["text"].rstrip().rpartition(" ")
        prompt = lm.tokenizer.encode(before, special=False)
        target = lm.tokenizer.encode(f" {word}", special=False)
        right.append(first_choices(lm, [*prompt, *target], len(target)))
    return share(right)


def first_choices(lm: LM, ids: list[int], count: int) -> bool:
    """Whether each of the last `count` tokens is the likeliest one at its place."""
    rows: list[np.ndarray] = []
    tokens = np.array([_start(lm), *ids], np.int32)
    lm.engine.release(
        lm.engine.start(tokens[:-1], lambda _, __, logits: rows.append(logits.argmax(axis=1)))
    )
    return bool((np.concatenate(rows)[-count:] == tokens[-count:]).all())


def share(right: list[bool]) -> dict[str, Any]:
    """Accuracy with its 95 % interval."""
    count, p = len(right), sum(right) / len(right)
    z2 = 1.96**2 / count  # Wilson (1927)
    centre, half = (p + z2 / 2) / (1 + z2), math.sqrt(z2 * (p * (1 - p) + z2 / 4)) / (1 + z2)
    interval = [round(centre - half, 4), round(centre + half, 4)]
    return {"accuracy": round(p, 4), "interval": interval, "items": count}


def samples(lm: LM) -> list[dict[str, Any]]:
    """Continuations, greedy and drawn at temperature 0.8 with seed 0, and one answer."""
    prompts: list[Any] = [*PROMPTS, [{"role": "user", "content": QUESTION}]]
    found = []
    for prompt in prompts:
        for temperature in (0.0, 0.8):
            output = lm.generate(
                prompt, max_new_tokens=SAMPLE_TOKENS, temperature=temperature, seed=0, controls=""
            )
            shown = prompt if isinstance(prompt, str) else QUESTION
            said = {"prompt": shown, "chat": shown is QUESTION, "temperature": temperature}
            found.append(said | {"text": output.text})
    return found


def measure(lm: LM, shared: Path, most: int, pairs: int, passages: int) -> dict[str, Any]:
    """Everything but the samples."""
    texts = held_out(shared, most)
    return {
        "format": lm.engine.format,
        "held_out": {name: bits_per_byte(lm, each) for name, each in texts.items()},
        "blimp": blimp(lm, shared / "data/blimp/blimp.jsonl.gz", pairs),
        "lambada": lambada(lm, shared / "data/lambada/lambada_test.jsonl.gz", passages),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--format", help="of the weights, as of `paceline generate`")
    parser.add_argument("--bytes", type=int, default=100_000, help="of each held-out source")
    parser.add_argument("--pairs", type=int, default=50, help="of each of BLiMP's 67 paradigms")
    parser.add_argument("--passages", type=int, default=500, help="of LAMBADA")
    options = parser.parse_args()
    lm = LM(options.model, dtype=options.format or "auto", drafter="plain", budget=0)
    found = measure(lm, options.shared, options.bytes, options.pairs, options.passages)
    print(json.dumps(found, indent=2))
    if options.format:
        return
    command = "python -m benchmarks.reference_models.evaluate MODEL"
    for name in ("bytes", "pairs", "passages"):
        if getattr(options, name) != parser.get_default(name):
            command += f" --{name} {getattr(options, name)}"
    where = {"command": command, "machine": machine(), "commit": commit()}
    results = {**where, **found, "samples": samples(lm)}
    (options.model / "results.json").write_text(
        json.dumps(results, indent=2, ensure_ascii=False) + "\n", "utf-8"
    )
    write_card(options.model)
    print(f"wrote {options.model / 'README.md'}", file=sys.stderr)


if __name__ == "__main__":
    main()
