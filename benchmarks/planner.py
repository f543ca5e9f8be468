"""A plan's choice beside a grid of setups, and its forecasts beside what is measured.

    python benchmarks/planner.py MODEL --minutes 7 --json FILE

For each of four goals a plan is made; then every setup of the grid that reaches the goal is run end
to end, the best forecasts first, as far as the minutes of the goal go: each in turns with the
chosen setup, so that a busy minute slows both. The two fastest ones then run three more rounds
beside the chosen setup, since the fastest of many noisy runs looks faster than it is. FILE is
written after every step; the same command goes on where it was. Prints one row a goal, as Markdown.
For `context`, memory is compared, which is computed, and not speed.

`--short` measures on two prompts and a short text: for models of more than a billion weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from paceline.errors import PacelineError, RequestError
from paceline.machine import commit
from paceline.planning.default_text import default_dialogues, default_text
from paceline.planning.plan_job import PlanJob, PlanQuestion
from paceline.planning.plan_search import Candidate
from paceline.planning.setups import Goal, Setup

NAMES = ("exact", "memory", "context", "users")
DRAFTERS = ("plain", "blend", "token_recycling", "recycle", "suffix", "lookup")
CLOSE = 0.15
GROUP = 3  # setups that are open beside the chosen one
FINALISTS, FINAL_ROUNDS = 2, 3
PLANNING = 0.5  # share of a goal's minutes that the plan may take
SHORT_PROMPTS, SHORT_TOKENS, SHORT_TEXT = 2, 24, 2500  # the text in characters


@dataclass
class GridRow:
    """What came of one goal.

    Attributes:
        goal: its name.
        chosen: setup of the plan.
        minutes: that the plan took.
        memory: bytes of the chosen setup.
        smallest: bytes of the smallest setup that reaches the goal.
        grid: number of setups that reach the goal.
        setups: those that were run, by title: forecast and measured tokens a second, bytes, loss.
        final: speed over that of the chosen setup, of the fastest ones, after more rounds.
        impossible: why nothing reaches the goal.
        done: everything was run that was to be.
    """

    goal: str
    chosen: str = ""
    minutes: float = 0.0
    memory: int = 0
    smallest: int = 0
    grid: int = 0
    setups: dict[str, dict[str, Any]] = field(default_factory=dict)
    final: dict[str, float] = field(default_factory=dict)
    impossible: str = ""
    done: bool = False

    @property
    def errors(self) -> list[float]:
        """Return by how much each forecast was off, in increasing order."""
        runs = self.setups.values()
        return sorted(abs(each["predicted"] / each["measured"] - 1) for each in runs)

    @property
    def of_the_best(self) -> float:
        """Return the chosen speed over the best one; for `context`, the least memory over its."""
        if self.goal == "context":
            return self.smallest / self.memory
        return 1 / max(1.0, *self.final.values()) if self.final else 1.0

    def line(self, default: str) -> str:
        """Return a row of the table."""
        if self.impossible:
            return f"| {self.goal} | impossible: {self.impossible} | | | | | | |"
        errors = self.errors
        close = sum(error <= CLOSE for error in errors)
        own = self.setups[self.chosen]["measured"]
        gain = f"{own / self.setups[default]['measured']:.2f}" if default in self.setups else "–"
        return (
            f"| {self.goal} | {self.chosen} | {self.of_the_best:.0%} | {gain} | "
            f"{len(errors)} of {self.grid} | {close} of {len(errors)} | "
            f"{errors[len(errors) // 2]:.0%} | {self.minutes:.1f} |"
        )


HEAD = (
    "| goal | chosen | of the best | times the default | run | within 15 % | median error "
    "| minutes |\n| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
)


class GridRun:
    """Plans and runs the grids of one model.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.end = monotonic() + 60 * options.minutes
        self.rows = {name: GridRow(name) for name in options.goals}
        dialogues, text, tokens = default_dialogues(), default_text(), options.tokens
        if options.short:
            dialogues, text = dialogues[:SHORT_PROMPTS], text[:SHORT_TEXT]
            tokens = min(tokens, SHORT_TOKENS)
        self.question = PlanQuestion(dialogues, text, tokens=tokens)
        self.default = Setup(options.model).title
        self._load()

    def run(self) -> None:
        """Run all goals that are not done."""
        left = [row for row in self.rows.values() if not row.done]
        for number, row in enumerate(left):
            seconds = max(self.end - monotonic(), 0.0) / (len(left) - number)
            row.setups.clear()
            row.final.clear()
            self._run_goal(row, seconds)
            row.done = True
            self.save()
            print(row.line(self.default), flush=True)

    def _run_goal(self, row: GridRow, seconds: float) -> None:
        start = monotonic()
        try:
            goal = self._goal(row.goal)
            job = self._job(goal, PLANNING * seconds)
            result = job.run()
            job.measurer.close()
        except RequestError as error:  # nothing reaches the goal
            row.impossible = str(error)
            return
        row.minutes = (monotonic() - start) / 60
        chosen = result.plan.chosen
        own = next(each for each in result.candidates if each.setup == chosen.setup)
        row.chosen, row.memory = own.setup.title, own.forecast.memory
        known = [each for each in result.candidates if each.fits(goal)]
        sure = [each.forecast.memory for each in known if each.exact or each.loss_measured]
        row.smallest = min([row.memory, *sure])
        grid = list(self._grid(known, own))
        row.grid = len(grid)
        self._measure(row, goal, own, grid, start + seconds)

    def _measure(
        self, row: GridRow, goal: Goal, own: Candidate, grid: Sequence[Candidate], end: float
    ) -> None:
        """Run the grid until the time is over, and the fastest ones again."""
        others = [each for each in grid if each.setup != own.setup]
        scale, spent = 0.0, 0.0
        for at in range(0, max(len(others), 1), GROUP):
            start = monotonic()
            if at and start + 2 * spent > end:  # as long for the last rounds
                break
            speeds = self._speeds(goal, [own, *others[at : at + GROUP]], end, 1)
            scale = scale or speeds[own.setup.title]
            for each in [own, *others[at : at + GROUP]]:
                title = each.setup.title
                if title in speeds and title not in row.setups:
                    row.setups[title] = {
                        "predicted": each.forecast.tokens_per_second,
                        "measured": speeds[title] * scale / speeds[row.chosen],
                        "memory": each.forecast.memory,
                        "loss": None if each.loss is None else each.loss.value,
                    }
            spent = monotonic() - start
            print(f"{row.goal}: {len(row.setups)} of {len(grid)} setups", file=sys.stderr)
            self.save()
        if row.goal == "context" or monotonic() > end:
            return
        fastest = sorted(others, key=lambda each: -_measured(row, each))[:FINALISTS]
        faster = [each for each in fastest if _measured(row, each) > 0.9 * _measured(row, own)]
        if faster:
            speeds = self._speeds(goal, [own, *faster], end, FINAL_ROUNDS)
            row.final = {name: speed / speeds[row.chosen] for name, speed in speeds.items()}

    def _speeds(
        self, goal: Goal, candidates: Sequence[Candidate], end: float, rounds: int
    ) -> dict[str, float]:
        """Return the tokens a second of setups that run in turns, by title."""
        job = self._job(goal, max(end - monotonic(), 1.0))
        try:
            found = job.verification(rounds).run(candidates)
        finally:
            job.measurer.close()
        return {each.candidate.setup.title: each.speed.value for each in found}

    def _grid(self, known: Sequence[Candidate], own: Candidate) -> Iterator[Candidate]:
        """Yield the setups to run: the default one, the chosen one, then by forecast.

        Budgets are automatic, but for weights that stream, where plans have none that are.
        """
        yield from (each for each in known if each.setup == Setup(self.options.model))
        yield own
        left = self.options.most or len(known)
        for each in known:
            setup = each.setup
            if setup in (own.setup, Setup(self.options.model)):
                continue
            automatic = setup.budget in ("auto", 0) or setup.weights_memory is not None
            if automatic and setup.drafter in self.options.drafters and not each.predicted:
                if not left:
                    return
                left -= 1
                yield each

    def _goal(self, name: str) -> Goal:
        """Return one of the four goals."""
        if name == "exact":
            return Goal(exact=True, loss=0.0)
        if name == "users":
            return Goal(users=8)
        job = self._job(Goal(), 0.0)
        if name == "context":
            return Goal(context=min(8192, job.measurer.model.config.context), prefer="memory")
        default = next(
            each for each in job.search.run() if each.setup == Setup(job.search.source.path)
        )
        return Goal(memory=round(0.6 * default.forecast.memory), loss=0.03)

    def _job(self, goal: Goal, seconds: float) -> PlanJob:
        say = (lambda line: print(line, file=sys.stderr)) if self.options.verbose else None
        minutes = seconds / 60
        if say is None:
            return PlanJob(self.options.model, goal, self.question, minutes)
        return PlanJob(self.options.model, goal, self.question, minutes, say=say)

    def _load(self) -> None:
        """Read what an earlier run of the same commit has done."""
        path = self.options.json
        if path is None or not path.exists():
            return
        document = json.loads(path.read_text())
        if document["commit"] != commit() or document["short"] != self.options.short:
            raise RequestError(
                f"{path} is of another commit or of other prompts; name another file"
            )
        for each in document["goals"]:
            if each["goal"] in self.rows:
                self.rows[each["goal"]] = GridRow(**each)

    def save(self) -> None:
        """Write what was measured so far, if a file was named."""
        if self.options.json is None:
            return
        document = {
            "model": Path(self.options.model).name,
            "commit": commit(),
            "short": self.options.short,
            "goals": [asdict(row) for row in self.rows.values()],
        }
        whole = self.options.json.with_suffix(".part")
        whole.write_text(json.dumps(document, indent=2))
        whole.replace(self.options.json)


def _measured(row: GridRow, candidate: Candidate) -> float:
    run = row.setups.get(candidate.setup.title)
    return 0.0 if run is None else float(run["measured"])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--goals", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--drafters", nargs="+", default=list(DRAFTERS))
    parser.add_argument("--minutes", type=float, default=7.0, help="of all goals, plans included")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--short", action="store_true", help="two prompts, a short text")
    parser.add_argument("--most", type=int, help="setups of a grid, beside default and chosen")
    parser.add_argument("--json", type=Path, help="written after every step, and gone on from")
    parser.add_argument("--verbose", action="store_true", help="tell what plans measure")
    options = parser.parse_args()
    try:
        run = GridRun(options)
        print(f"{Path(options.model).name}, commit {commit()}\n\n{HEAD}", flush=True)
        for row in run.rows.values():
            if row.done:
                print(row.line(run.default), flush=True)
        run.run()
    except PacelineError as error:
        sys.exit(f"planner: {error}")


if __name__ == "__main__":
    main()
