"""Time to the first token: plain decoding and a drafter under `--budget auto`, in turns.

    python benchmarks/first_token.py MODEL [--drafter blend] [--sizes 100 1000 4000] [--rounds 9]

Prompts of each size are pieces of stories-val, as in `drafters.py`, repeated where they are
too short; every round takes another piece, and who begins alternates. What a drafter learnt before
is forgotten each time. The ratio is the median of those of the rounds, with its 95 % interval.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
from busy import busy_others, ticks

from drafters import STORIES
from paceline import LM
from paceline.core import Request
from paceline.decoding.governor import Budget, Fixed
from paceline.decoding.loop import Generation
from paceline.drafters.base import Drafter
from paceline.machine import machine, versions
from paceline.measuring.statistics import median_interval
from paceline.registry import drafters


def seconds(lm: LM, drafter: Drafter, budget: Budget, prompt: tuple[int, ...]) -> float:
    """Return the time from a prompt to the first token."""
    generation = Generation(lm.engine, drafter, Request(prompt, 1), budget)
    start = perf_counter()
    generation.run()
    return perf_counter() - start


def rounds(lm: LM, text: list[int], size: int, count: int) -> tuple[list[float], list[float]]:
    """Return the times of plain decoding and of the model's own drafter, round by round."""
    nobody = drafters.parse("plain").build(lm.draft_target)
    random, times = np.random.default_rng(size), ([], [])
    for turn in range(count + 1):
        at = int(random.integers(0, max(len(text) - size, 1)))
        prompt = tuple((text * (size // len(text) + 1))[at : at + size])
        lm.reset()
        arms = [(0, nobody, Fixed(0)), (1, lm.drafter, lm.budget)]
        for place, drafter, budget in arms[:: 1 if turn % 2 else -1]:
            took = seconds(lm, drafter, budget, prompt)
            if turn:  # the first round is for caches and buffers
                times[place].append(took)
    return times


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--drafter", default="blend")
    parser.add_argument("--format", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", nargs="+", type=int, default=[100, 1000, 4000])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    lm = LM(options.model, drafter=options.drafter, dtype=options.format, threads=options.threads)
    text = list(lm.encode(gzip.decompress(STORIES.read_bytes()).decode()[:40_000]))
    start = ticks()
    print("| prompt | plain, ms | " + options.drafter + ", ms | ratio |\n|---:|---:|---:|---:|")
    for size in options.sizes:
        if size >= lm.engine.config.context:
            print(f"| {size} | the model sees {lm.engine.config.context} tokens | | |")
            continue
        plain, drafted = rounds(lm, text, size, options.rounds)
        ratio, low, high = median_interval([b / a for a, b in zip(plain, drafted, strict=True)])
        print(
            f"| {size} | {median(plain) * 1e3:.1f} | {median(drafted) * 1e3:.1f} "
            f"| {ratio:.3f} ({low:.3f} to {high:.3f}) |",
            flush=True,
        )
    print(
        f"\n{options.model.name}, {lm.engine.format}, {options.threads} threads; others took "
        f"{busy_others(start, ticks()):.0%} of the cores; {machine()['processor']}; "
        f"Paceline {versions()['commit']}."
    )


if __name__ == "__main__":
    main()
