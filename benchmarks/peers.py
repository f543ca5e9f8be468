"""Paceline's native engine beside its peers: the same weights, threads and process, taking turns.

    python benchmarks/peers.py --shape 135m|1.1b [--bits 8] [--threads 2] [--rounds 5] [--json FILE]
    python benchmarks/peers.py --model ../shared/models/stories260K
    python benchmarks/peers.py --file MODEL.gguf [--format auto] [--format int8]

Peers: llama.cpp, OpenVINO and transformers, those that are installed or the ones named by `--peer`.
A shape has random weights: its numbers say something about time and rounding, nothing about
quality. Measured in every round, one engine after the other, each after a pass that does not count:

- passes of 1 to 32 tokens over 64 cached ones, logits for all: plain decoding is the first,
  verification of a draft the others;
- a prompt of 512 tokens. The peers compute the logits of the last one, we of none.

`--file` takes a GGUF file instead: llama.cpp and we run the same file, each in its own bits.

Cells are medians over the rounds, ratios medians of the rounds' own ratios. Once, not timed: 200
tokens in one batch against one at a time, and both against our fp32.

Other work on the machine ruins such a comparison (threads that wait for each other at every matrix
lose a time slice each time), so the report says how busy others kept the cores in the meantime.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from busy import busy_others, ticks
from runners import GGUF, PEERS, WIDTHS, Opened, Paceline, Runner, chosen, opened, opened_file
from step import SHAPES, RandomWeights

from paceline import _native
from paceline.core import Floats, Tokens
from paceline.engines.native import NativeEngine
from paceline.machine import machine, versions
from paceline.models import load
from paceline.models.config import ModelConfig

SIZES = (1, 2, 4, 8, 16, 32)
TIMED = (*map(str, SIZES), "prompt")
CACHED = 64  # positions before a pass
PASSES = 3  # of each size in a round
AGREEMENT = 200  # tokens


class Source(NamedTuple):
    """A model to compare on.

    Attributes:
        name: its shape or folder.
        kind: `random` or `real` weights.
        config: its shape.
        path: its folder or GGUF file, None for random weights.
    """

    name: str
    kind: str
    config: ModelConfig
    path: Path | None

    def weights(self) -> Mapping[str, Floats]:
        """Return the same values at each call, when read in the mapping's order."""
        return load(self.path).weights if self.path else RandomWeights(self.config)


class Reference(NamedTuple):
    """Tokens [n] and our fp32 logits [n, V] after each."""

    tokens: Tokens
    logits: Floats


def source(options: argparse.Namespace) -> Source:
    if where := options.model or options.file:
        return Source(where.name, "real", load(where).config, where)
    return Source(options.shape, "random", SHAPES[options.shape], None)


def reference(of: Source, threads: int) -> Reference:
    """Random tokens; for a real model those that it writes greedily."""
    runner = Paceline(NativeEngine(of.config, of.weights(), threads, "fp32"))
    tokens = _draw(of.config, AGREEMENT)
    if of.path:
        tokens[0] = of.config.bos or 0
        for i in range(1, AGREEMENT):
            tokens[i] = _rows(runner, tokens[i - 1 : i])[0].argmax()
        runner.truncate(0)
    return Reference(tokens, _rows(runner, tokens).copy())


def agreement(runner: Runner, against: Reference) -> dict[str, float]:
    """How far the logits lie from fp32, and whether a batch chooses what single tokens do."""
    runner.truncate(0)
    batch = _rows(runner, against.tokens).copy()
    runner.truncate(0)
    single = [_rows(runner, against.tokens[i : i + 1])[0].argmax() for i in range(AGREEMENT)]
    choices = batch.argmax(1)
    error = np.linalg.norm(batch - against.logits) / np.linalg.norm(against.logits)
    return {
        "batch_as_single": float(np.mean(choices == single)),
        "choice_as_fp32": float(np.mean(choices == against.logits.argmax(1))),
        "logit_error": float(error),
    }


def time_round(runner: Runner, config: ModelConfig, prompt: int, threads: int) -> dict[str, float]:
    """One engine's turn: seconds of a pass of each size and of the prompt.

    `read_share` is what a single token reached of the memory's speed in this turn; on a shared host
    that speed changes from minute to minute.
    """
    read = _native.read_bandwidth(threads)
    runner.truncate(0)
    runner.extend(_draw(config, CACHED), False)
    runner.extend(_draw(config, 1), True)
    seconds = {}
    for n in SIZES:
        times = []
        for _ in range(PASSES):
            runner.truncate(CACHED)
            times.append(_time(runner, _draw(config, n), True))
        seconds[str(n)] = median(times)
    runner.truncate(0)
    seconds["prompt"] = _time(runner, _draw(config, prompt), False)
    return seconds | {"read_share": runner.bytes / seconds["1"] / read}


def compare(
    of: Source, bits: int, options: argparse.Namespace, against: Reference
) -> list[dict[str, Any]]:
    """Return a row for each engine of one width, peers first."""
    config, threads = of.config, options.threads
    prompt = min(options.prompt, config.context)
    with _engines(of, bits, options) as engines:
        rows: list[dict[str, Any]] = [
            {"engine": each.name, "kernels": each.kernels, "ours": each.ours, "bits": bits}
            | {"bytes": each.runner.bytes, "rounds": []}
            | agreement(each.runner, against)
            for each in engines
        ]
        start = ticks()
        for _ in range(options.rounds):
            for row, each in zip(rows, engines, strict=True):
                row["rounds"].append(time_round(each.runner, config, prompt, threads))
        others = busy_others(start, ticks())
    for row in rows:
        row["others"] = others
        row |= summary(row, [other for other in rows if not other["ours"]], prompt)
    return rows


def _engines(
    of: Source, bits: int, options: argparse.Namespace
) -> AbstractContextManager[list[Opened]]:
    if options.file:
        return opened_file(of, options.file, options.format, options.peers, options.threads)
    return opened(of, bits, options.peers, options.isa, options.threads)


def summary(row: dict[str, Any], peers: list[dict[str, Any]], prompt: int) -> dict[str, Any]:
    """Medians, and for one of ours how many times as fast as each peer."""
    rounds = row["rounds"]
    decode = median(r["1"] for r in rounds)
    return {
        "tokens_per_second": 1 / decode,
        "gigabytes_per_second": row["bytes"] / decode / 1e9,
        "read_share": median(r["read_share"] for r in rounds),
        "cost": {n: median(r[str(n)] / r["1"] for r in rounds) for n in SIZES[1:]},
        "prompt_tokens_per_second": prompt / median(r["prompt"] for r in rounds),
        "speedup": {
            peer["engine"]: {
                key: median(t[key] / o[key] for o, t in zip(rounds, peer["rounds"], strict=True))
                for key in TIMED
            }
            for peer in peers
            if row["ours"]
        },
    }


def conditions(of: Source, options: argparse.Namespace) -> dict[str, Any]:
    """Under which the numbers hold; the report, as yet without rows."""
    return {
        "model": of.name,
        "weights": of.kind,
        "threads": options.threads,
        "rounds": options.rounds,
        "cached": CACHED,
        "prompt": min(options.prompt, of.config.context),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "peers": options.peers,
        "read_gigabytes_per_second": [_native.read_bandwidth(options.threads) / 1e9],
        "rows": [],
    }


def markdown(report: dict[str, Any]) -> str:
    """Two tables, each engine and ours against each peer, and the conditions."""
    others = max(row["others"] for row in report["rows"])
    lines = [
        *_table(
            (
                *("engine", "kernels", "tok/s", "GB/s", "of memory's"),
                *(f"T({n})/T(1)" for n in SIZES[1:]),
                f"prompt of {report['prompt']}, tok/s",
                *("batch as single", "choice as fp32", "logit error"),
            ),
            [_cells(row) for row in report["rows"]],
            2,
        ),
        "",
        *_table(
            (
                *("times as fast", "kernels", "as", "one token"),
                *(f"pass of {n}" for n in SIZES[1:]),
                "prompt",
            ),
            [
                (row["engine"], row["kernels"], peer, *(f"{times[key]:.2f}" for key in TIMED))
                for row in report["rows"]
                for peer, times in row["speedup"].items()
            ],
            3,
        ),
        "",
        f"{report['model']}, {report['weights']} weights, {report['threads']} threads, medians of "
        f"{report['rounds']} rounds; {report['machine']['processor']}, which reads memory at "
        f"{median(report['read_gigabytes_per_second']):.1f} GB/s; others took up to {others:.0%} "
        f"of the cores; Paceline {report['versions']['commit']}, "
        f"{', '.join(report['peers'].values())}, {report['date']}.",
    ]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["engine"],
        row["kernels"],
        f"{row['tokens_per_second']:.1f}",
        f"{row['gigabytes_per_second']:.1f}",
        f"{row['read_share']:.0%}",
        *(f"{row['cost'][n]:.2f}" for n in SIZES[1:]),
        f"{row['prompt_tokens_per_second']:.0f}",
        f"{row['batch_as_single']:.1%}",
        f"{row['choice_as_fp32']:.1%}",
        f"{row['logit_error']:.4f}",
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]], words: int) -> list[str]:
    """Markdown; the first `words` columns are text, the others numbers."""
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def _rows(runner: Runner, tokens: Tokens) -> Floats:
    rows = runner.extend(tokens, True)
    if rows is None:
        raise RuntimeError("no logits")
    return rows


def _time(runner: Runner, tokens: Tokens, logits: bool) -> float:
    start = perf_counter()
    runner.extend(tokens, logits)
    return perf_counter() - start


def _draw(config: ModelConfig, count: int) -> Tokens:
    return np.random.default_rng(count).integers(0, config.vocab_size, count).astype(np.int32)


def main() -> None:
    """Parse the command line, measure one width after the other, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--shape", choices=SHAPES)
    which.add_argument("--model", type=Path, help="a checkpoint of the Llama family")
    which.add_argument("--file", type=Path, help="a GGUF file, for us and llama.cpp as it is")
    parser.add_argument("--format", action="append", help="with --file: ours; default: auto")
    parser.add_argument("--bits", type=int, choices=WIDTHS, action="append", help="default: all")
    parser.add_argument("--peer", choices=PEERS, action="append", help="default: the installed")
    parser.add_argument("--isa", choices=_native.isas(), action="append")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--json", type=Path, help="write the report here as well")
    options = parser.parse_args()
    options.format = options.format or ["auto"]
    options.peers, of = chosen(options.peer, options.bits), source(options)
    if options.file:
        options.peers = {name: options.peers[name] for name in GGUF if name in options.peers}
    report = conditions(of, options)
    against = reference(of, options.threads)
    for bits in [0] if options.file else options.bits or WIDTHS:  # 0: as the file has them
        gc.collect()
        report["rows"] += compare(of, bits, options, against)
        report["read_gigabytes_per_second"].append(_native.read_bandwidth(options.threads) / 1e9)
        if options.json:  # what is known so far: a large shape takes a quarter of an hour
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(markdown(report))


if __name__ == "__main__":
    main()
