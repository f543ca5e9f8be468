"""What guessing costs beside the pass that it is for: each drafter, at the shape of a real model.

    python benchmarks/proposals.py MODEL [--teacher SMALL] [--budgets 8 16 32] [--requests 1 8]

Greedy decoding of stories with a fixed budget: each request of a pass has a drafter that proposes a
tree, the pass runs all trees, the drafters learn from it. Shares are of the pass: the proposals of
all its requests over its time, at the median and at the 95th percentile of the passes; and what is
learnt afterwards likewise, at the median. A pass of a large model leaves nothing of the drafters in
the caches, so nothing shorter than a real pass stands in for it.

Drafters are measured with something to remember: `--teacher` is a small model with the same tokens,
e.g. the one that MODEL was inflated from, with which each first answers `--lessons` prompts. The
governor is not part of it, nor drafters that run a model (`model`, `layer_skip`, `sparse_kv`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from busy import busy_others, ticks
from cold import Prompts, stories

from paceline import LM
from paceline.core import Floats
from paceline.decoding.governor import Fixed
from paceline.decoding.loop import Generation
from paceline.decoding.session import Session
from paceline.drafters.base import Drafter
from paceline.engines.base import Engine
from paceline.machine import machine, versions
from paceline.models.tokenizer import same_tokens
from paceline.registry import drafters

DRAFTERS = ("lookup", "suffix", "lookahead_trie", "trigram", "lookahead", "recycle", "blend")
FIRST = 2  # passes that are not counted
NEW = 400  # tokens of an answer at most; none is to end before the passes do


class Pass(NamedTuple):
    """Seconds of one pass, and nodes of each request's tree beyond the root.

    `proposals` has one number for each request.
    """

    proposals: list[float]
    learning: float
    forward: float
    nodes: float


def passes(
    lm: LM, guessing: Sequence[Drafter], prompts: Prompts, budget: int, count: int
) -> list[Pass]:
    """Decode all prompts together, `count` passes."""
    runs = []
    for drafter, prompt in zip(guessing, prompts, strict=True):
        request = lm.request(prompt, max_new_tokens=NEW, temperature=0.0, ignore_eos=True)
        runs.append(opened(lm.engine, Session(lm.engine, drafter, request)))
    found = []
    while len(found) < count + FIRST and not any(run.done for run in runs):
        found.append(one_pass(lm.engine, runs, budget))
    for run in runs:
        run.close()
    if len(found) < count + FIRST:
        raise SystemExit(f"an answer was over after {len(found)} passes; take fewer --passes")
    return found[FIRST:]


def opened(engine: Engine, run: Session) -> Session:
    """With its prompt run."""
    run.open()
    while run.missing:
        assert run.sequence is not None
        part = run.next_part()
        run.commit_part(
            part,
            engine.forward([(run.sequence, part)], "all" if run.wants_prefill_logits else "none"),
        )
    return run


def one_pass(engine: Engine, runs: Sequence[Session], budget: int) -> Pass:
    """Draft, forward, walk, learn, as `serving/drafter_pool.py` does."""
    trees, proposals = [], []
    for run in runs:
        start = perf_counter()
        trees.append(run.propose(budget))
        proposals.append(perf_counter() - start)
    batch = [(run.sequence, tree) for run, tree in zip(runs, trees, strict=True) if run.sequence]
    start = perf_counter()
    logits = engine.forward(batch)
    forward, learning = perf_counter() - start, 0.0
    rows: list[Floats] = np.split(logits, np.cumsum([len(tree) for tree in trees])[:-1])
    for run, tree, row in zip(runs, trees, rows, strict=True):
        walked = run.verify(tree, row)
        start = perf_counter()
        run.learn(tree, row, walked)
        learning += perf_counter() - start
        run.accept(tree, walked)
    return Pass(proposals, learning, forward, float(np.mean([len(tree) - 1 for tree in trees])))


def row(name: str, requests: int, budget: int, found: Sequence[Pass]) -> dict[str, Any]:
    """Return what the table shows of some passes."""
    each = np.array([one.proposals for one in found])
    forward = np.array([one.forward for one in found])
    shares = each.sum(1) / forward
    return {
        "drafter": name,
        "requests": requests,
        "budget": budget,
        "passes": len(found),
        "nodes": float(np.mean([one.nodes for one in found])),
        "proposal": float(np.median(each)),
        "proposal_p95": float(np.quantile(each, 0.95)),
        "pass": float(np.median(forward)),
        "share": float(np.median(shares)),
        "share_p95": float(np.quantile(shares, 0.95)),
        "learning": float(np.median([one.learning / one.forward for one in found])),
    }


def taught(lm: LM, name: str, count: int, teacher: LM | None, lessons: Prompts) -> list[Drafter]:
    """Drafters of one method for so many requests, as a server has them.

    Those that share what they learn have all lessons in common; the others have as many in total.
    """
    method = drafters.parse(name)
    first = method.build(lm.draft_target)
    found = [first, *(first.fork() or method.build(lm.draft_target) for _ in range(count - 1))]
    if teacher is None:
        return found
    for number, prompt in enumerate(lessons):
        request = teacher.request(prompt, max_new_tokens=100, temperature=0.0, ignore_eos=True)
        Generation(teacher.engine, found[number % count], request, Fixed(8)).run()
    return found


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    lm = LM(options.model, drafter="plain", dtype=options.format, threads=options.threads)
    teacher = LM(options.teacher, drafter="plain", threads=1) if options.teacher else None
    if teacher is not None and not same_tokens(lm.tokenizer, teacher.tokenizer):
        raise SystemExit(f"{options.teacher} has other tokens than {options.model}")
    prompts = iter(stories(lm.model))
    lessons = list(islice(prompts, options.lessons))
    asked = {budget: list(islice(prompts, max(options.requests))) for budget in options.budgets}
    rows = []
    for name in options.drafters:
        for requests in options.requests:
            guessing = taught(lm, name, requests, teacher, lessons)
            count = max(options.passes // (1 if requests == 1 else 2), 2)
            for budget in options.budgets:
                found = passes(lm, guessing, asked[budget][:requests], budget, count)
                rows.append(row(name, requests, budget, found))
                print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    return (
        f"| `{row['drafter']}` | {row['requests']} | {row['budget']} | {row['nodes']:.1f} "
        f"| {row['proposal'] * 1e6:.0f} | {row['proposal_p95'] * 1e6:.0f} "
        f"| {row['pass'] * 1e3:.0f} | {row['share']:.2%} | {row['share_p95']:.2%} "
        f"| {row['learning']:.2%} |"
    )


HEAD = (
    "| drafter | requests | budget | nodes | proposal, us | 95 % | pass, ms | share of it | 95 % "
    "| learning |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def main() -> None:
    """Measure one drafter after the other, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--teacher", type=Path, help="a small model with the same tokens")
    parser.add_argument("--lessons", type=int, default=24, help="prompts that drafters learn from")
    parser.add_argument("--drafters", nargs="+", default=list(DRAFTERS))
    parser.add_argument("--budgets", nargs="+", type=int, default=[8, 16, 32])
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--passes", type=int, default=24, help="half as many of several requests")
    parser.add_argument("--format", default="int8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    start = ticks()
    print(HEAD)
    rows = measure(options)
    others, where, what = busy_others(start, ticks()), machine(), versions()
    if options.json:
        report = {"rows": rows, "others": others, "machine": where, "versions": what}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"\n{options.model.name}, {options.format}, {options.threads} threads; others took "
        f"{others:.0%} of the cores; {where['processor']}; Paceline {what['commit']}."
    )


if __name__ == "__main__":
    main()
