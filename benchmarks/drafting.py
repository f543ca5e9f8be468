"""What drafting costs a request in each pass: proposing, choosing, learning.

    python benchmarks/drafting.py ../shared/models/stories260K [--requests 8] [--budget auto]

Requests with prompts of stories-val share one drafter's tables and one governor, as in the server.
Trees are sized as for a model of 135 million parameters (`SECONDS`), and between drafting and
learning memory is read that is larger than the processor's caches, as the weights of such a model
are: with warm caches everything is twice as fast. Processor time of the thread, so that other work
on the machine counts only where it empties caches.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from time import thread_time

import numpy as np

from drafters import prompts
from paceline import LM
from paceline.core import Cost
from paceline.decoding.session import Session
from paceline.serving import drafter_pool
from paceline.serving.batch_entry import BatchEntry
from paceline.serving.drafter_pool import DrafterPool

NODES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
SECONDS = tuple(ms / 1e3 for ms in (13, 14.5, 16, 17.5, 20, 24, 26, 30, 34, 39, 47, 55))
NEW = 100  # tokens of each answer
LARGE = 12_000_000  # numbers of 8 bytes


class Company:
    """Some requests at a time; another one starts when one is done."""

    def __init__(self, model: Path, requests: int, budget: int | None) -> None:
        self.lm = LM(model, threads=1)
        self.cost, self.budget = Cost(NODES, SECONDS), budget
        lm = self.lm
        self.lanes = DrafterPool(lm.drafter_method, lm.draft_target, self.cost, lm.drafter)
        self.runs = self.answers()
        self.running = [next(self.runs) for _ in range(requests)]
        self.weights = np.ones(LARGE)

    def answers(self) -> Iterator[Session]:
        """Return requests that have run their prompts."""
        for prompt in cycle(prompts(self.lm, slice(0, 400))):
            request = self.lm.request(prompt, max_new_tokens=NEW, temperature=0.0, ignore_eos=True)
            run = Session(self.lm.engine, self.lanes.take(), request)
            run.open()
            while run.missing:
                part = run.next_part()
                rows = self.lm.engine.forward([(run.sequence, part)], "all")
                run.commit_part(part, rows)
            yield run

    def step(self) -> tuple[float, int, int]:
        """One pass: seconds of drafting, nodes, tokens."""
        entries = [BatchEntry(str(i), run, self.budget) for i, run in enumerate(self.running)]
        self.weights.sum()
        start = thread_time()
        self.lanes.draft(entries, 512, 0)
        spent = thread_time() - start - sum(entry.seconds for entry in entries)
        logits = self.lm.engine.forward([(entry.run.sequence, entry.tree) for entry in entries])
        self.weights.sum()
        sizes = [len(entry.tree) for entry in entries]
        self.lanes.commit(entries, np.split(logits, np.cumsum(sizes)[:-1]))
        start = thread_time()
        self.lanes.record(entries, self.cost.at(sum(sizes)), sum(sizes))
        spent += thread_time() - start
        for i, entry in enumerate(entries):
            if entry.error:
                raise entry.error
            if entry.run.done:
                entry.run.close()
                self.lanes.give(entry.run.drafter)
                self.running[i] = next(self.runs)
        tokens = sum(len(entry.walked.drawn) for entry in entries if entry.walked)
        return spent + sum(entry.seconds for entry in entries), sum(sizes), tokens


def main() -> None:
    """Parse the command line, print one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--budget", default="auto", help="nodes of each tree, or auto")
    parser.add_argument("--passes", type=int, default=300)
    options = parser.parse_args()
    drafter_pool.perf_counter = thread_time  # type: ignore[attr-defined]
    budget = None if options.budget == "auto" else int(options.budget)
    company = Company(options.model, options.requests, budget)
    for _ in range(20):
        company.step()
    seconds, nodes, tokens = zip(*(company.step() for _ in range(options.passes)), strict=True)
    each = options.requests * options.passes
    print(
        f"{statistics.median(seconds) / options.requests * 1e6:.0f} us of drafting a request and "
        f"pass, {sum(nodes) / each:.2f} nodes, {sum(tokens) / each:.2f} tokens"
    )


if __name__ == "__main__":
    main()
