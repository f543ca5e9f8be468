"""A plan's choice beside an exhaustive grid, and its forecasts beside what is measured.

    python benchmarks/planner.py MODEL --minutes 10

For each goal a plan is made; then every setup of the grid that reaches the goal is run end to end,
each in turns with the default setup, so that a busy minute slows both. Prints one row a goal, as
Markdown: what was chosen, its speed (for `context` its memory) against the best of the grid, and
how many forecasts were within 15 %. `--json FILE` writes every setup.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from paceline.errors import RequestError
from paceline.machine import commit
from paceline.planning.default_text import default_dialogues, default_text
from paceline.planning.plan_job import PlanJob, PlanQuestion
from paceline.planning.plan_search import Candidate
from paceline.planning.setups import Goal, Setup

NAMES = ("exact", "memory", "context", "users")
DRAFTERS = ("plain", "blend", "token_recycling", "recycle", "suffix")
CLOSE = 0.15
GROUP = 3  # setups that are open beside the default one


@dataclass
class Row:
    """What came of one goal.

    Attributes:
        goal: its name.
        chosen: setup of the plan.
        minutes: that the plan took.
        against_best: speed over that of the best setup; for `context` the best memory over its own.
        setups: of the grid: title, predicted and measured tokens a second, bytes.
    """

    goal: str
    chosen: str
    minutes: float
    against_best: float
    setups: list[dict[str, Any]]

    @property
    def errors(self) -> list[float]:
        """Return by how much each forecast was off."""
        return [abs(each["predicted"] / each["measured"] - 1) for each in self.setups]


def goal_of(name: str, job: PlanJob) -> Goal:
    """Return one of the four goals for a model."""
    context = job.measurer.model.config.context
    if name == "exact":
        return Goal(exact=True, loss=0.0)
    if name == "context":
        return Goal(context=min(8192, context), prefer="memory")
    if name == "users":
        return Goal(users=8)
    return Goal(memory=round(0.6 * default_setup(job).forecast.memory), loss=0.03)


def default_setup(job: PlanJob) -> Candidate:
    """Return the default setup with its forecast; a goal may leave it out."""
    model = job.search.source.path
    return next(each for each in job.search.run() if each.setup == Setup(model))


def grid_of(
    candidates: Sequence[Candidate], goal: Goal, drafters: Sequence[str], most: int | None
) -> list[Candidate]:
    """Return the setups that reach a goal, with automatic budgets."""
    found = [
        each
        for each in candidates
        if each.fits(goal)
        and each.setup.budget in ("auto", 0)
        and each.setup.drafter in drafters
        and not each.predicted
    ]
    return found[:most]


def measured(
    job: PlanJob, default: Candidate, grid: Sequence[Candidate], rounds: int
) -> list[float]:
    """Return the tokens a second of each setup, on the scale of the first run of the default."""
    speeds: list[float] = []
    scale = 0.0
    for start in range(0, len(grid), GROUP):
        part = grid[start : start + GROUP]
        first, *others = job.verification(rounds).run([default, *part])
        scale = scale or first.speed.value
        speeds += [each.speed.value * scale / first.speed.value for each in others]
        print(f"{len(speeds)} of {len(grid)} setups", file=sys.stderr)
    return speeds


def row_of(name: str, options: argparse.Namespace) -> Row:
    """Make a plan of a goal and run the grid."""
    question = PlanQuestion(default_dialogues(), default_text(), tokens=options.tokens)
    first = PlanJob(options.model, Goal(), question, options.minutes)
    goal, default = goal_of(name, first), default_setup(first)
    first.measurer.close()
    start = monotonic()
    job = PlanJob(options.model, goal, question, options.minutes)
    result = job.run()
    minutes = (monotonic() - start) / 60
    chosen = result.plan.chosen
    own = next(each for each in result.candidates if each.setup == chosen.setup)
    grid = grid_of(result.candidates, goal, options.drafters, options.most)
    if own not in grid:
        grid.append(own)
    speeds = measured(PlanJob(options.model, goal, question, 1e4), default, grid, options.rounds)
    setups = [
        {
            "setup": each.setup.title,
            "predicted": each.forecast.tokens_per_second,
            "measured": speed,
            "memory": each.forecast.memory,
            "loss": None if each.loss is None else each.loss.value,
        }
        for each, speed in zip(grid, speeds, strict=True)
    ]
    if goal.prefer == "memory":
        against = min(each["memory"] for each in setups) / chosen.memory
    else:
        against = speeds[grid.index(own)] / max(speeds)
    return Row(name, chosen.setup.title, minutes, against, setups)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--goals", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--drafters", nargs="+", default=list(DRAFTERS))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--most", type=int, help="setups of a grid, by forecast")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(f"{options.model}, commit {commit()}\n")
    print("| goal | chosen | of the best | setups | within 15 % | median error | minutes |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    rows = []
    for name in options.goals:
        try:
            rows.append(row_of(name, options))
        except RequestError as error:  # nothing reaches the goal
            print(f"{name}: {error}", file=sys.stderr)
            continue
        print(line(rows[-1]), flush=True)
        if options.json:
            options.json.write_text(json.dumps([vars(row) for row in rows], indent=2))


def line(row: Row) -> str:
    """Return a row as Markdown."""
    errors = sorted(row.errors)
    close = sum(error <= CLOSE for error in errors) / len(errors)
    return (
        f"| {row.goal} | {row.chosen} | {row.against_best:.0%} | {len(errors)} | {close:.0%} | "
        f"{errors[len(errors) // 2]:.0%} | {row.minutes:.1f} |"
    )


if __name__ == "__main__":
    main()
