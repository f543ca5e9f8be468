"""Prompts read apart, beside one process that reads them itself: streams and first tokens.

    python benchmarks/prefill_apart.py MODEL [--length 4000] [--rounds 2] [--hop 0.02]

`--streams` requests decode plainly all the time, while prompts of `--length` random tokens arrive
one after the other. Arms, in turns round by round over the same prompts:

- `apart`: this process decodes with `--threads` threads, a prefill replica reads with as many;
- `one`: one process with `--threads` threads does both, as on one machine of the two;
- `both`: one process with the threads of the two together;
- `beside`: this process decodes, and another one reads the same prompts for nobody: what sharing
  the machine costs streams by itself, without anything that is handed over.

Measured are the time between the tokens of the streams (median and 99th percentile), alone and from
a prompt's arrival to its first token, the time to that token, and tokens of streams per second.
`--streams 0` gives the time to first token of a server that is otherwise idle.
`--hop` seconds are added to each message between the two processes, as on a slower network. First
tokens of all arms must be equal. `--break-even` instead measures, on an idle server, the time to
first token by the length of the prompt, read here and apart.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from busy import busy_others, ticks

from paceline import LM
from paceline.machine import machine, versions
from paceline.serving.messages import Job
from paceline.serving.prefill.node import CHUNK
from paceline.serving.prefill.opening import open_prefill
from paceline.serving.prefill.pool import PrefillPool
from paceline.serving.prefill.settings import Prefill, PrefillSettings
from paceline.serving.worker import Worker

STEPS = 24  # passes of streams before anything is measured
SIZES = (64, 128, 192, 256, 384, 512, 1024)


@contextmanager
def replica(lm: LM, options: argparse.Namespace) -> Iterator[PrefillPool]:
    """A prefill replica with as many threads as this process."""
    settings = PrefillSettings(
        str(options.model),
        threads=options.threads,
        weight_format=options.format,
        kv_format=options.kv_format,
        hop_seconds=options.hop,
    )
    pool = open_prefill(lm.model, lm.engine, Prefill(1, 64), settings)
    try:
        yield pool
    finally:
        pool.close()


def read_for_nobody(model: str, options: dict[str, Any], prompts: Connection) -> None:
    """Read the prompts that come, one after the other, and tell when each is read."""
    with LM(model, drafter="plain", budget=0, **options) as lm:
        prompts.send("ready")
        while (prompt := prompts.recv()) is not None:
            lm.engine.release(lm.engine.start(np.array(prompt, np.int32), chunk=CHUNK))
            prompts.send("read")


@contextmanager
def neighbour(options: argparse.Namespace) -> Iterator[Connection]:
    """Start a process that reads prompts for nobody."""
    here, there = get_context("spawn").Pipe()
    opened = {
        "dtype": options.format,
        "kv_format": options.kv_format,
        "threads": options.threads,
    }
    target = (str(options.model), opened, there)
    process = get_context("spawn").Process(target=read_for_nobody, args=target)
    process.start()
    try:
        here.recv()
        yield here
        here.send(None)
    finally:
        process.join(60)
        process.kill()


class Streams:
    """Requests that decode all the time, and the times of their tokens."""

    def __init__(self, lm: LM, worker: Worker, count: int, tokens: int) -> None:
        self.lm, self.worker = lm, worker
        self.names = [f"stream {number}" for number in range(count)]
        for number, name in enumerate(self.names):
            text = (
                np.random.default_rng(number).integers(5, lm.engine.config.vocab_size, 30).tolist()
            )
            request = lm.request(text, max_new_tokens=tokens, temperature=0, ignore_eos=True)
            worker.submit(Job(name, request, budget=0))
        self.last: dict[str, float] = {}

    def step(self, gaps: list[float]) -> dict[str, list[int]]:
        """Run a pass; add the gaps between tokens, and return the tokens of other requests."""
        others: dict[str, list[int]] = {}
        for event in self.worker.step():
            if event.error:
                raise SystemExit(event.error)
            if event.id not in self.names:
                others.setdefault(event.id, []).extend(event.tokens)
            elif event.tokens:
                if event.id in self.last:
                    gaps.append(event.at - self.last[event.id])
                self.last[event.id] = event.at
        return others


def run_arm(
    lm: LM,
    pool: PrefillPool | None,
    prompts: list[list[int]],
    options: argparse.Namespace,
    other: Connection | None = None,
) -> dict[str, Any]:
    """Gaps of streams alone and while prompts are read, times to first token, and these tokens.

    With `other` that process reads the prompts, and there are no first tokens.
    """
    worker = Worker(lm, memory=options.memory, prefix_cache=0.0, prefill=pool)
    alone: list[float] = []
    during: list[float] = []
    firsts: list[float] = []
    tokens: list[int] = []
    try:
        room = lm.engine.config.context - 40
        streams = Streams(lm, worker, options.streams, room)
        for _ in range(STEPS):
            streams.step([])  # prompts of the streams
        for number, prompt in enumerate(prompts):
            for _ in range(options.alone if options.streams else 0):
                streams.step(alone)
            if other is not None:
                other.send(prompt)
                while not other.poll():
                    streams.step(during)
                other.recv()
                continue
            request = lm.request(prompt, max_new_tokens=1, temperature=0, ignore_eos=True)
            start, name = perf_counter(), f"prompt {number}"
            worker.submit(Job(name, request, budget=0))
            while name not in (got := streams.step(during)) or not got[name]:
                pass
            firsts.append(perf_counter() - start)
            tokens += got[name]
    finally:
        worker.close()
    return {"alone": alone, "during": during, "first": firsts, "tokens": tokens}


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Medians and percentiles over all rounds of an arm."""
    joined = {key: [each for run in runs for each in run[key]] for key in runs[0]}
    found = {"first_token": median(joined["first"])} if joined["first"] else {}
    for key in ("alone", "during"):
        if joined[key]:
            found |= {
                f"{key}_p50": median(joined[key]),
                f"{key}_p99": float(np.quantile(joined[key], 0.99)),
                f"{key}_gaps": len(joined[key]),
                f"{key}_per_second": len(joined[key]) / sum(joined[key]),
            }
    return found


def compare(
    lm: LM, pool: PrefillPool, options: argparse.Namespace, other: Connection | None
) -> dict[str, Any]:
    """All arms in turns."""
    arms: dict[str, tuple[PrefillPool | None, int]] = {
        "apart": (pool, options.threads),
        "one": (None, options.threads),
        "both": (None, 2 * options.threads),
        "beside": (None, options.threads),
    }
    draw = np.random.default_rng(options.seed)
    vocabulary = lm.engine.config.vocab_size
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in options.arms}
    for number in range(options.rounds):
        prompts = draw.integers(5, vocabulary - 5, (options.prompts, options.length)).tolist()
        order = options.arms if number % 2 == 0 else options.arms[::-1]
        for name in order:
            used, lm.engine.threads = arms[name]  # type: ignore[misc]
            reads = other if name == "beside" else None
            runs[name].append(run_arm(lm, used, prompts, options, reads))
        if len({tuple(each[-1]["tokens"]) for each in runs.values() if each[-1]["tokens"]}) > 1:
            raise SystemExit("a first token is another one where the prompt was read apart")
    lm.engine.threads = options.threads  # type: ignore[misc]
    return {name: summary(each) for name, each in runs.items()}


def break_even(lm: LM, pool: PrefillPool, options: argparse.Namespace) -> dict[str, Any]:
    """Time to first token by length, on an idle server, read here and apart."""
    options.streams, found = 0, {}
    draw = np.random.default_rng(options.seed)
    for size in options.sizes:
        prompts = draw.integers(5, lm.engine.config.vocab_size - 5, (options.prompts, size + 1))
        times = {
            name: median(run_arm(lm, used, prompts.tolist(), options)["first"])
            for name, used in (("here", None), ("apart", pool))
        }
        found[str(size)] = times | {"ratio": times["apart"] / times["here"]}
    return found


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--length", type=int, default=4000)
    parser.add_argument("--prompts", type=int, default=1, help="one after the other in a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--alone", type=int, default=200, help="passes of streams before a prompt")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--arms", nargs="+", default=["apart", "one", "both", "beside"])
    parser.add_argument("--hop", type=float, default=0.0, help="seconds added to each message")
    parser.add_argument("--format", default="auto")
    parser.add_argument("--kv-format", default="fp16")
    parser.add_argument("--memory", type=int, default=2 * 10**9, help="of keys and values, bytes")
    parser.add_argument("--break-even", action="store_true")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    begun = ticks()
    with ExitStack() as stack:
        lm = stack.enter_context(
            LM(
                options.model,
                dtype=options.format,
                kv_format=options.kv_format,
                threads=options.threads,
                drafter="plain",
                budget=0,
            )
        )
        pool = stack.enter_context(replica(lm, options))
        if options.break_even:
            found = break_even(lm, pool, options)
        else:
            shares = "beside" in options.arms and options.streams
            other = stack.enter_context(neighbour(options)) if shares else None
            found = compare(lm, pool, options, other)
        found["handed_over"] = {"pages": pool.statistics.pages, "bytes": pool.received_bytes}
    found["others"] = busy_others(begun, ticks())
    for name, each in found.items():
        shown = (
            each if isinstance(each, float) else ", ".join(f"{k} {v:.4g}" for k, v in each.items())
        )
        print(f"{name}: {shown}")
    if options.json:
        found |= {"machine": machine(), "versions": versions()}
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
