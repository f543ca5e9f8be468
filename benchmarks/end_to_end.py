"""Whole outputs on one model: plain decoding, `--budget auto`, and peers; all take turns.

    python benchmarks/end_to_end.py MODEL [--format int8] [--drafter recycle] [--peer llama.cpp]
    python benchmarks/end_to_end.py MODEL --tasks 4
    python benchmarks/end_to_end.py MODEL.gguf --chat --tasks 10 --reset --peer llama.cpp

Prompts are the first 64 tokens of documents of stories-val, as in `drafters.py`; `--random` takes
random tokens instead, `--tasks N` the first N questions of each of the six tasks of Spec-Bench,
`--chat` puts those into the model's chat template. 100 new tokens (`--new`), greedy, past the
model's own end, in a chat up to it; times are of decoding, without the prompt, and ratios those of
the seconds of a token. A drafter keeps what it learns from prompt to prompt unless `--reset`.

Of a GGUF file peers run the very bits, as we do by default. Of other models peers run the same
weights in the width next to ours, a Llama only. Each decodes plainly, and with
its prompt lookup: transformers by its own `generate`, OpenVINO by GenAI, llama.cpp by the rule of
its Python binding (the first earlier place of the last 2 tokens, else of the last, gives 10).
Ours must equal our plain output. A peer rounds differently and leaves it at the first near tie: the
table says after how many tokens, and below it how many of the tokens of our first outputs the peer
chooses too when it reads them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import numpy as np
from asked import Asked, asked
from busy import busy_others, ticks
from openvino_llama import OpenVino
from openvino_lookup import OpenVinoLookup, missing
from runners import GGUF, PEERS, WIDTHS, Opened, Runner, chosen, opened, opened_file
from transformers_llama import Transformers

from paceline import LM
from paceline.core import Floats
from paceline.decoding.governor import Budget, Fixed, Governor
from paceline.machine import machine, versions
from paceline.measuring.statistics import median_interval
from paceline.models import Model
from paceline.models.config import ModelConfig

LONGEST, LOOKED_UP = 2, 10  # of llama-cpp-python's prompt lookup: tokens matched, tokens drafted
CHECKED = 5  # outputs that peers read
CONTEXT = 4096  # positions of a peer's cache on a GGUF file
BITS = {storage: bits for bits, width in WIDTHS.items() for storage in width.ours}


class Answer(NamedTuple):
    """New tokens, seconds of decoding, passes of the model; 0 passes: not known."""

    tokens: list[int]
    seconds: float
    passes: int

    @property
    def pace(self) -> float:
        """Seconds a token."""
        return self.seconds / len(self.tokens)


class Arm(NamedTuple):
    """A way to answer; `runner` is what a peer's plain passes run on."""

    name: str
    answer: Callable[[list[int]], Answer]
    ours: bool = False
    runner: Runner | None = None


class Checkpoint(NamedTuple):
    """A `runners.Source`."""

    model: Model

    @property
    def config(self) -> ModelConfig:
        """Its shape."""
        return self.model.config

    def weights(self) -> Mapping[str, Floats]:
        """Read from the checkpoint at each call."""
        return self.model.weights


def our_lms(options: argparse.Namespace) -> list[LM]:
    """One for each drafter."""
    settings = {"dtype": options.format, "threads": options.threads, "budget": "auto"}
    return [LM(options.model, drafter=name, **settings) for name in options.drafter]


def our_arms(
    lms: list[LM], ask: Asked, options: argparse.Namespace
) -> tuple[list[Arm], list[Governor]]:
    """Plain decoding, then one arm for each drafter, with its governor."""
    governors = [lm.budget for lm in lms if isinstance(lm.budget, Governor)]

    def arm(name: str, lm: LM, budget: Budget) -> Arm:
        def answer(prompt: list[int]) -> Answer:
            lm.budget = budget
            if options.reset:
                lm.reset()
            request = lm.request(
                prompt, max_new_tokens=ask.new, temperature=0.0, controls={}, ignore_eos=True
            )
            if ask.stops:
                request = replace(request, stop_tokens=ask.stops)
            output = lm.stream(request).run()
            return Answer(output.tokens, output.seconds.decode, output.passes)

        return Arm(f"Paceline {lm.engine.format}, {name}", answer, ours=True)

    drafted = [arm(name, lm, lm.budget) for name, lm in zip(options.drafter, lms, strict=True)]
    return [arm("plain", lms[0], Fixed(0)), *drafted], governors


def plain(runner: Runner, prompt: list[int], ask: Asked) -> Answer:
    """Greedy decoding, one token in a pass."""
    _prefill(runner, prompt)
    start = perf_counter()
    tokens = [prompt[-1]]
    while len(tokens) <= ask.new and (len(tokens) == 1 or tokens[-1] not in ask.stops):
        tokens += _choices(runner, tokens[-1:])
    return Answer(tokens[1:], perf_counter() - start, len(tokens) - 1)


def looked_up(runner: Runner, prompt: list[int], ask: Asked) -> Answer:
    """Greedy decoding that drafts from what was said before."""
    _prefill(runner, prompt)
    start = perf_counter()
    text, passes = list(prompt), 0
    end, ended = len(prompt) + ask.new, False
    while len(text) < end and not ended:
        draft = _lookup(text)[: end - len(text) - 1]
        choices = _choices(runner, text[-1:] + draft)
        passes += 1
        right = next((i for i, token in enumerate(draft) if token != choices[i]), len(draft))
        text += choices[: right + 1]
        ended = not ask.stops.isdisjoint(choices[: right + 1])
        if right < len(draft):
            runner.truncate(len(text) - 1)
    return Answer(text[len(prompt) :], perf_counter() - start, passes)


def generated(tokens: list[int], seconds: float) -> Answer:
    """Return what a peer's own loop gave; it reports the time after the first token only."""
    return Answer(tokens, seconds * len(tokens) / (len(tokens) - 1), 0)


def peer_arms(runner: Runner, name: str, model: Model, ask: Asked, threads: int) -> Iterator[Arm]:
    """Plain, and with prompt lookup where there is one."""
    new = ask.new
    yield Arm(f"{name}, plain", lambda prompt: plain(runner, prompt, ask), runner=runner)
    if isinstance(runner, Transformers):
        lookup = lambda prompt: generated(*runner.generate(prompt, new, LOOKED_UP))  # noqa: E731
    elif isinstance(runner, OpenVino):
        if lacking := missing():
            print(f"no prompt lookup of OpenVINO: {', '.join(lacking)} not installed")
            return
        genai = OpenVinoLookup(model, threads, name.split()[-1])
        lookup = lambda prompt: generated(*genai.generate(prompt, new))  # noqa: E731
    else:
        lookup = lambda prompt: looked_up(runner, prompt, ask)  # noqa: E731
    yield Arm(f"{name}, lookup", lookup)


def measure(arms: list[Arm], asked: list[list[int]], file: Path | None) -> list[list[Answer]]:
    """Each arm's answers; who begins changes from prompt to prompt."""
    answers: list[list[Answer]] = [[] for _ in arms]
    for turn, prompt in enumerate(asked):
        for step in range(len(arms)):
            place = (turn + step) % len(arms)
            answers[place].append(arms[place].answer(prompt))
        for arm, found in zip(arms, answers, strict=True):
            if arm.ours and found[-1].tokens != answers[0][-1].tokens:
                raise SystemExit(f"prompt {turn}, {arm.name}: the outputs differ; this is a bug")
        if file:  # what is known so far
            rows = {arm.name: list(map(list, a)) for arm, a in zip(arms, answers, strict=True)}
            file.write_text(json.dumps(rows) + "\n")
    return answers


def table(arms: list[Arm], answers: list[list[Answer]], new: int) -> str:
    """One row for each arm; ratios are medians over prompts, with their 95 % intervals."""
    bases = [0, *(i for i, arm in enumerate(arms) if arm.runner)]
    head = ["", "tok/s", "tokens per pass", *(f"x {arms[i].name}" for i in bases)]
    head += ["slowest / fastest prompt", "all prompts", "tokens as our plain"]
    lines = [_row(head), _row(["---", *["---:"] * (len(head) - 1)])]
    for arm, found in zip(arms, answers, strict=True):
        passes = sum(answer.passes for answer in found)
        own = ratios(answers[0], found)
        tokens = sum(len(answer.tokens) for answer in found)
        cells = [arm.name, f"{median(1 / answer.pace for answer in found):.1f}"]
        cells.append(f"{tokens / passes:.2f}" if passes else "")
        for base in bases:
            middle, low, high = median_interval(ratios(answers[base], found))
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        total = pace(answers[0]) / pace(found)
        cells += [f"{min(own):.2f} / {max(own):.2f}", f"{total:.2f}"]
        alike = [same(a, b) for a, b in zip(answers[0], found, strict=True)]
        cells.append(f"median {median(alike):.0f} of {new}")
        lines.append(_row(cells))
    return "\n".join(lines)


def agreement(runner: Runner, asked: list[list[int]], said: list[Answer]) -> float:
    """Share of the tokens of our plain outputs that are the peer's own choice at their place."""
    alike = 0
    for prompt, answer in zip(asked, said, strict=True):
        runner.truncate(0)
        choices = _choices(runner, prompt + answer.tokens[:-1])[len(prompt) - 1 :]
        alike += sum(a == b for a, b in zip(choices, answer.tokens, strict=True))
    return alike / sum(len(answer.tokens) for answer in said)


def task_table(arms: list[Arm], answers: list[list[Answer]], tasks: list[str]) -> str:
    """How many times as fast as our plain decoding, all of a task's time together."""
    names = list(dict.fromkeys(tasks))
    lines = [_row(["x our plain", *names]), _row(["---", *["---:"] * len(names)])]
    for arm, found in zip(arms[1:], answers[1:], strict=True):
        cells = [arm.name]
        for name in names:
            mine = [i for i, task in enumerate(tasks) if task == name]
            before, after = (pace([each[i] for i in mine]) for each in (answers[0], found))
            cells.append(f"{before / after:.2f}")
        lines.append(_row(cells))
    return "\n".join(lines)


def ratios(base: list[Answer], found: list[Answer]) -> list[float]:
    """How many times as fast, prompt by prompt."""
    return [b.pace / f.pace for b, f in zip(base, found, strict=True)]


def pace(answers: list[Answer]) -> float:
    """Seconds a token over all answers."""
    return sum(a.seconds for a in answers) / sum(len(a.tokens) for a in answers)


def same(left: Answer, right: Answer) -> int:
    """Tokens before the first that differs."""
    pairs = zip(left.tokens, right.tokens, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(map(len, (left[0], right[0]))))


def _prefill(runner: Runner, prompt: list[int]) -> None:
    runner.truncate(0)
    runner.extend(np.array(prompt[:-1], np.int32), False)


def _choices(runner: Runner, tokens: list[int]) -> list[int]:
    rows = runner.extend(np.array(tokens, np.int32), True)
    if rows is None:
        raise RuntimeError("no logits")
    return [int(choice) for choice in rows.argmax(1)]


def _lookup(text: list[int]) -> list[int]:
    """Return what followed the earliest earlier occurrence of the last tokens."""
    for size in range(min(LONGEST, len(text) - 1), 0, -1):
        for at in range(len(text) - size):
            if text[at : at + size] == text[-size:]:
                return text[at + size : at + size + LOOKED_UP]
    return []


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def peers_of(
    lm: LM, options: argparse.Namespace
) -> tuple[dict[str, str], AbstractContextManager[list[Opened]]]:
    """The builds of the peers that are asked for, and those peers on the model's weights."""
    if not options.peer:
        return {}, nullcontext([])
    of = Checkpoint(lm.model)
    if options.model.suffix == ".gguf":
        builds = {name: build for name, build in chosen(options.peer, None).items() if name in GGUF}
        return builds, opened_file(of, options.model, [], builds, options.threads, CONTEXT)
    bits = BITS[lm.engine.format]
    builds = chosen(options.peer, [bits])
    return builds, opened(of, bits, builds, None, options.threads, False)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--format", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--drafter", action="append", help="default: recycle")
    parser.add_argument("--peer", choices=PEERS, action="append", help="default: none")
    parser.add_argument("--count", type=int, default=40, help="prompts")
    parser.add_argument("--new", type=int, default=100, help="most tokens of an answer")
    parser.add_argument("--reset", action="store_true", help="forget after each prompt")
    parser.add_argument("--chat", action="store_true", help="in the model's chat template")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--random", action="store_true")
    which.add_argument("--tasks", type=int, metavar="N", help="questions of each Spec-Bench task")
    parser.add_argument("--json", type=Path, help="write every answer here")
    options = parser.parse_args()
    if options.chat and not options.tasks:
        parser.error("--chat needs --tasks")
    options.drafter = options.drafter or ["recycle"]
    lms = our_lms(options)
    lm = lms[0]
    ask = asked(
        lm,
        tasks=options.tasks,
        chat=options.chat,
        random=options.random,
        count=options.count,
        new=options.new,
    )
    arms, governors = our_arms(lms, ask, options)
    builds, opening = peers_of(lm, options)
    with ExitStack() as stack:
        for each in stack.enter_context(opening):
            arms += peer_arms(each.runner, each.name, lm.model, ask, options.threads)
            _prefill(each.runner, ask.prompts[0])  # what is done only once: threads, buffers
            _choices(each.runner, ask.prompts[0][-1:])
        start = ticks()
        answers = measure(arms, ask.prompts, options.json)
        others = busy_others(start, ticks())
        chosen_too = {
            arm.name: agreement(arm.runner, ask.prompts[:CHECKED], answers[0][:CHECKED])
            for arm in arms
            if arm.runner
        }
    print(table(arms, answers, ask.new), end="\n\n")
    for name, share in chosen_too.items():
        print(f"{name}: chooses {share:.1%} of the tokens of our first outputs.", end="\n\n")
    if ask.tasks:
        print(task_table(arms, answers, ask.tasks), end="\n\n")
    commit, builds = versions()["commit"], "".join(f", {build}" for build in builds.values())
    print(f"{options.model.name}, {len(ask.prompts)} prompts, {options.threads} threads;", end=" ")
    print(f"{machine()['processor']}; others took {others:.0%} of the cores;", end=" ")
    print(f"Paceline {commit}{builds}")
    for name, budget in zip(options.drafter, governors, strict=True):
        print(f"{name}: {budget.report()}")


if __name__ == "__main__":
    main()
