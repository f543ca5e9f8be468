"""`paceline bench`: speed against plain decoding on this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.cli import evaluation, options, parsing
from paceline.cli.output import check_target, save_text, say, show
from paceline.cli.progress import counting
from paceline.errors import RequestError

if TYPE_CHECKING:
    from paceline.control.grammar import Grammar
    from paceline.measuring.baseline import TurnOptions
    from paceline.measuring.prompts import Dialogue


class StateChoice(StrEnum):
    """Whether drafters keep what they learned from prompt to prompt."""

    carried = "carried"
    reset = "reset"
    both = "both"


@dataclass(frozen=True)
class BenchPromptOptions(evaluation.SuiteOptions):
    """Prompts."""

    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Only the first N lines; of each task with --suite or --tasks."),
    ] = None
    tasks: Annotated[
        str | None, typer.Option(help="Only these categories, or tasks of the suite; with commas.")
    ] = None
    chat: options.Chat = False

    def read(self) -> list[Dialogue]:
        """Return the lines of the file, or those of some tasks.

        Raises:
            RequestError: as `read_tasks`.
        """
        tasks = [] if self.tasks is None else [task.strip() for task in self.tasks.split(",")]
        return self.read_tasks(tasks)


@dataclass(frozen=True)
class RoundOptions:
    """Measurement."""

    drafters: options.Drafters = field(default_factory=lambda: ["all"])
    budget: Annotated[
        str, typer.Option(help="Nodes beyond the root or auto; one or more, with commas.")
    ] = "16,auto"
    repeat: Annotated[int, typer.Option(min=1, max=1000, help="Rounds over all prompts.")] = 3
    max_new_tokens: options.NewTokens = 100
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0
    walk: options.Walk = "gumbel"
    seed: options.Seed = 0
    state: Annotated[
        StateChoice,
        typer.Option(help="Whether drafters keep what they learned from prompt to prompt."),
    ] = StateChoice.carried

    def asking(self, chat: bool, rules: Grammar | None, guides: tuple[str, ...]) -> TurnOptions:
        """Return the options of every request."""
        from paceline.measuring.baseline import TurnOptions

        return TurnOptions(
            self.max_new_tokens,
            self.temperature,
            self.seed,
            chat,
            ignore_eos=rules is None,
            grammar=rules,
            guide=guides,
            walk=self.walk,
        )


@dataclass(frozen=True)
class BenchReportOptions(evaluation.ReportOptions):
    """Results."""

    html: Annotated[
        Path | None, typer.Option(help="Write a self-contained HTML page with plots to this file.")
    ] = None

    def check(self) -> None:
        """Refuse, before the work begins, paths that cannot be written.

        Raises:
            PacelineError: see `check_target`; or both are one.
        """
        super().check()
        check_target(self.html)
        if self.html and self.out and self.html.resolve() == self.out.resolve():
            raise RequestError(f"--out and --html both name {self.out}; give two names")

    def deliver(self, record: dict[str, Any]) -> None:
        """Write the page and the document where they were requested."""
        from paceline.measuring.report.html import page

        if self.html:
            save_text(self.html, page(record))
        super().deliver(record)


def bench(
    model: options.Models,
    *,
    prompt_options: BenchPromptOptions,
    rounds: RoundOptions,
    constraints: options.ConstraintOptions,
    engine: options.EngineOptions,
    report: BenchReportOptions,
) -> None:
    """Measure drafters against plain decoding.

    Arms take turns on each prompt; each round starts with drafters that have learned nothing. All
    arms decode the same number of tokens, past the end of the text if need be; outputs under a
    grammar end with it. Turns and clipped prompts are as in `paceline prove`. With --walk rejection
    outputs have plain decoding's distribution, not its text. Exit 1 if an output differs that must
    not.
    """
    report.check()
    budgets, rules = parsing.budgets(rounds.budget), constraints.rules()
    job = evaluation.prepare(model, prompt_options, rounds.drafters, engine)
    from paceline.measuring import bench as measure
    from paceline.measuring.report.document import bench_document, conditions
    from paceline.measuring.report.tables import bench_tables

    asking = rounds.asking(prompt_options.chat, rules, constraints.guides)
    states = [name for name in measure.STATES if rounds.state in (name, "both")]
    with counting(job.turns * (rounds.repeat + 1)) as tick:
        result = measure.bench(
            job.lm, job.methods, job.dialogues, asking, budgets, rounds.repeat, states, tick
        )
    record = {
        "schema": "paceline-bench/1",
        **conditions(job.lm, model),
        "settings": settings(prompt_options, rounds, asking, budgets, job),
        "left_out": job.left_out,
        **bench_document(result),
    }
    show(bench_tables(record), stdout=not report.json)
    different = report_differences(record, job)
    report.deliver(record)
    if different and job.lm.engine.invariant:
        raise typer.Exit(1)


def settings(
    prompt_options: BenchPromptOptions,
    rounds: RoundOptions,
    asking: TurnOptions,
    budgets: list[int | str],
    job: evaluation.EvaluationJob,
) -> dict[str, Any]:
    """Return the settings as the document holds them."""
    return {
        "file": prompt_options.origin,
        "suite": prompt_options.suite,
        "tasks": list(dict.fromkeys(dialogue.category for dialogue in job.dialogues)),
        "lines": len(job.dialogues),
        "turns": job.turns,
        "repeat": rounds.repeat,
        "budgets": budgets,
        "max_new_tokens": rounds.max_new_tokens,
        "temperature": rounds.temperature,
        "walk": rounds.walk,
        "seed": rounds.seed,
        "chat": prompt_options.chat,
        "guide": list(asking.guide),
        "ignore_eos": asking.ignore_eos,
        "grammar": asking.grammar and asdict(asking.grammar),
        "state": rounds.state.value,
    }


def report_differences(record: dict[str, Any], job: evaluation.EvaluationJob) -> int:
    """Print what was left out or may differ; return how many outputs differ that must not."""
    job.report_omissions(record["clipped"], job.turns)
    lossy = parsing.lossy(job.methods)
    for name in lossy:
        say(f"{name} is lossy: its outputs may differ from plain decoding's")
    exact = [arm for arm in record["arms"] if arm["drafter"] not in lossy]
    different = sum(arm["different"] for arm in exact if arm["walk"] == "gumbel")
    if different:
        say(f"{different} outputs differ from plain decoding; `paceline prove` says where and why")
    return int(different)
