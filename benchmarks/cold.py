"""Speculation against none where no prompt ever comes back: at the worker, and through HTTP.

`auto` and `plain` (a budget of 0) run the same prompts in turn, in one process: the worker inside
this one, then a server. Nothing is kept of prompts (no prefix cache), or the second arm would find
what the first has run. Each row begins with drafters that have learnt nothing, apart from what
`paceline warm` kept of the model, and go on learning from round to round as a server's do.
"""

from __future__ import annotations

import argparse
import gzip
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from servers import ours

from paceline import LM
from paceline.measuring.prompts import read_prompts
from paceline.measuring.statistics import total_ratio
from paceline.models import Model, load
from paceline.serving.messages import Job
from paceline.serving.worker import Worker

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
QUESTIONS = SHARED / "spec-bench" / "question.jsonl"
STORIES = SHARED / "stories-val" / "soda-tinystories-instruct_val.txt.gz"
ARMS = {"auto": None, "plain": 0}
USERS = (1, 8)
WAVES = 3  # answers to each user in a round; plain ones end together, others leave a tail
COUNTS = ("passes", "nodes", "draft", "forward", "walk")  # of a worker's; the last are seconds
PROMPT, LONGEST = 64, 256  # tokens of a story's beginning; of a question at most, its last

Prompts = list[list[int]]


class Run(NamedTuple):
    """One arm of a round; `more` are the worker's own counts."""

    tokens: int
    seconds: float
    more: dict[str, float] | None = None


Arm = Callable[[Prompts], Run]
Fresh = Callable[[int], AbstractContextManager[dict[str, Arm]]]  # arms for so many users


def suites(model: Model, new: int) -> dict[str, Prompts]:
    """Prompts of different kinds as tokens, all distinct; questions of all tasks are mixed."""
    room = min(LONGEST, model.config.context - new)
    encode = model.tokenizer.encode
    questions = [list(encode(each.turns[0]))[-room:] for each in read_prompts(QUESTIONS)]
    random.Random(0).shuffle(questions)
    return {"stories": stories(model), "Spec-Bench": _distinct(questions)}


def stories(model: Model) -> Prompts:
    """Beginnings of the documents of stories-val, all distinct."""
    text = gzip.decompress(STORIES.read_bytes()).decode()
    found = [story.replace("<|endoftext|>", "").strip() for story in text.split("\n\n")]
    tokens = (list(model.tokenizer.encode(story)) for story in found if story)
    return _distinct([ids[:PROMPT] for ids in tokens if len(ids) >= PROMPT])


def _distinct(prompts: Prompts) -> Prompts:
    return [list(each) for each in dict.fromkeys(map(tuple, prompts))]


def cold_part(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Return a row for each level, kind of prompts and number of users."""
    model = load(options.model)
    found = suites(model, options.tokens)
    rows = []
    for level, opened in {"worker": _worker, "HTTP": _http}.items():
        with opened(options, folder) as fresh:
            for suite, prompts in found.items():
                for users in USERS:
                    each = max(options.requests, WAVES * users)
                    with fresh(users) as arms:
                        row = compare(arms, _batches(prompts, each, options.rounds + 1))
                    rows.append({"level": level, "prompts": suite, "users": users} | row)
                    print(line(rows[-1]), flush=True)
    return rows


def _batches(prompts: Prompts, each: int, rounds: int) -> list[Prompts]:
    if each * rounds > len(prompts):
        raise SystemExit(
            f"{rounds} rounds of {each} prompts, and {len(prompts)} differ; take fewer --rounds or "
            "--requests"
        )
    return [prompts[number * each :][:each] for number in range(rounds)]


def compare(arms: dict[str, Arm], batches: Sequence[Prompts]) -> dict[str, Any]:
    """Both arms over each batch in turn; the first batch warms up."""
    rounds: list[dict[str, Run]] = []
    for number, batch in enumerate(batches):
        order = list(arms) if number % 2 else list(arms)[::-1]
        runs = {name: arms[name](batch) for name in order}
        if len({run.tokens for run in runs.values()}) > 1:
            raise SystemExit(f"the arms differ in tokens: {runs}")
        if number:
            rounds.append(runs)
    plain, auto = ([runs[name].seconds for runs in rounds] for name in ("plain", "auto"))
    ratio = total_ratio(plain, auto)
    ratios = [p / a for p, a in zip(plain, auto, strict=True)]
    tokens = sum(runs["auto"].tokens for runs in rounds)
    return {
        "tokens_per_second": {"auto": tokens / sum(auto), "plain": tokens / sum(plain)},
        **{"ratio": ratio.value, "low": ratio.low, "high": ratio.high},
        **{"least": min(ratios), "most": max(ratios)},
        "rounds": [{name: run._asdict() for name, run in runs.items()} for runs in rounds],
    }


@contextmanager
def _worker(options: argparse.Namespace, folder: Path) -> Iterator[Fresh]:
    """One model for all rows; each row has a worker and drafters that know nothing."""
    lm = LM(options.model, dtype=options.format, threads=options.threads)

    @contextmanager
    def fresh(users: int) -> Iterator[dict[str, Arm]]:
        lm.reset()
        worker = Worker(lm, max_running=max(USERS), prefix_cache=0.0)
        loop = Loop(worker, users, options.tokens)
        yield {name: partial(loop.run, budget) for name, budget in ARMS.items()}
        worker.close()

    yield fresh


@contextmanager
def _http(options: argparse.Namespace, folder: Path) -> Iterator[Fresh]:
    """Start a server of its own for each row."""

    @contextmanager
    def fresh(users: int) -> Iterator[dict[str, Arm]]:
        with ours(options, folder, "--prefix-cache", "0") as client:

            def run(budget: int | None, prompts: Prompts) -> Run:
                extra = {} if budget is None else {"speculation": {"budget": budget}}
                found = client.load(users, prompts, **extra)
                return Run(found["tokens"], found["seconds"])

            yield {name: partial(run, budget) for name, budget in ARMS.items()}

    yield fresh


class Loop:
    """A closed loop without HTTP.

    Args:
        worker: runs the passes.
        users: who ask again once they are answered.
        tokens: of an answer.
    """

    def __init__(self, worker: Worker, users: int, tokens: int) -> None:
        self._worker, self._users, self._tokens = worker, users, tokens
        self._answers: dict[tuple[int, ...], list[int]] = {}

    def run(self, budget: int | None, prompts: Prompts) -> Run:
        """Job each prompt once; a budget of None lets the governor choose.

        Raises:
            SystemExit: an answer is not that of the other arm.
        """
        request = partial(
            self._worker.lm.request,
            max_new_tokens=self._tokens,
            temperature=0.0,
            ignore_eos=True,
        )
        jobs = [Job(f"{n}", request(each), budget=budget) for n, each in enumerate(prompts)]
        outputs: dict[str, list[int]] = {}
        before, start = asdict(self._worker.stats), perf_counter()
        todo = iter(jobs)
        for job in islice(todo, self._users):
            self._worker.submit(job)
        while not self._worker.idle:
            for event in self._worker.step():
                if event.output is not None:
                    outputs[event.id] = event.output.tokens
                    for job in islice(todo, 1):
                        self._worker.submit(job)
        seconds, after = perf_counter() - start, asdict(self._worker.stats)
        for job in jobs:
            said = outputs[job.id]
            if self._answers.setdefault(job.request.prompt, said) != said:
                raise SystemExit(f"the arms differ: {said}, {self._answers[job.request.prompt]}")
        return Run(
            sum(map(len, outputs.values())),
            seconds,
            {name: after[name] - before[name] for name in COUNTS},
        )


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    speeds = row["tokens_per_second"]
    return (
        f"| {row['level']} | {row['prompts']} | {row['users']} | {speeds['auto']:.1f} "
        f"| {speeds['plain']:.1f} | {row['ratio']:.2f} | {row['low']:.2f} to {row['high']:.2f} "
        f"| {row['least']:.2f} to {row['most']:.2f} |"
    )


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown; the interval is of 95 %, by resampling rounds."""
    return [
        "| level | prompts | users | auto, tok/s | plain, tok/s | ratio | interval | rounds |",
        "|---|---|---:|---:|---:|---:|---|---|",
        *map(line, rows),
    ]
