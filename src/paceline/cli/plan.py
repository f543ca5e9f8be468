"""`paceline plan`: the fastest exact, or the smallest good enough, setup for this machine."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.byte_sizes import Size
from paceline.cli import options
from paceline.cli.output import check_target, document, save_text, say, show
from paceline.errors import RequestError

if TYPE_CHECKING:
    from paceline.planning.plan_job import PlanQuestion
    from paceline.planning.setups import Goal

_DEFAULT_LOSS = 0.02
_MOST_MINUTES = 7 * 24 * 60


@dataclass(frozen=True)
class GoalOptions:
    """Goal."""

    memory: Annotated[
        str | None,
        typer.Option(
            help="Maximum memory of weights, keys and values, drafters and scratch, e.g. 2GB."
        ),
    ] = None
    context: Annotated[
        str | None,
        typer.Option(help="Tokens that each user's text may have, e.g. 8k; those of the prompts."),
    ] = None
    users: Annotated[
        int, typer.Option(min=1, max=4096, help="Texts that run at once; speed is of all.")
    ] = 1
    loss: Annotated[
        float | None,
        typer.Option(
            help="Maximum loss in nats a token against the model as stored, or in score with "
            "--judge; 0.02 by default."
        ),
    ] = None
    exact: Annotated[
        bool, typer.Option("--exact", help="Only what changes no output: the format as stored.")
    ] = False
    prefer: Annotated[
        str, typer.Option(help="speed: most tokens a second; memory: fewest bytes.")
    ] = "speed"

    def goal(self) -> Goal:
        """Return the goal.

        Raises:
            RequestError: a value cannot be, or two contradict each other.
        """
        from paceline.planning.setups import Goal

        if self.exact and self.loss is not None:
            raise RequestError("--exact allows no loss; leave out --loss, or --exact")
        loss = 0.0 if self.exact else _DEFAULT_LOSS if self.loss is None else self.loss
        return Goal(
            None if self.memory is None else parse_size("--memory", self.memory),
            None if self.context is None else parse_tokens("--context", self.context),
            self.users,
            loss,
            self.exact,
            self.prefer,
        )


@dataclass(frozen=True)
class PlanningOptions:
    """Measuring."""

    for_: Annotated[
        Path | None,
        typer.Option(
            "--for",
            help="Your prompts: a .jsonl file with `prompt` or `turns`, or a prompt a line; four "
            "questions by default.",
        ),
    ] = None
    limit: Annotated[int, typer.Option(min=1, help="Only the first N prompts.")] = 8
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text file on which losses are measured, plain or .jsonl with `text`; a short "
            "one by default. KV policies need one longer than twice the context."
        ),
    ] = None
    judge: Annotated[
        str,
        typer.Option(
            help="Your own judge of answers: reads one, gets the prompt as its last argument, "
            "prints 0 to 1 or exits with 0."
        ),
    ] = ""
    minutes: Annotated[
        float, typer.Option(help="Maximum time; 0 measures nothing that is not known.")
    ] = 10.0
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 48
    temperature: Annotated[float, typer.Option(min=0, help="Of the answers; 0 is greedy.")] = 0.0
    checkpoint: Annotated[
        list[str],
        typer.Option(
            help="Another checkpoint of the same base, e.g. a compressed one; repeatable. Those "
            "of `paceline models` are found."
        ),
    ] = field(default_factory=list)
    drafter: Annotated[
        list[str],
        typer.Option(help="Another drafter to consider, e.g. model:path=FOLDER; repeatable."),
    ] = field(default_factory=list)

    def check(self) -> None:
        """Refuse numbers that cannot be and drafters that do not exist.

        Raises:
            PacelineError: says what is wrong.
        """
        from paceline import registry
        from paceline.core import Exactness

        if not (math.isfinite(self.minutes) and 0 <= self.minutes <= _MOST_MINUTES):
            raise RequestError(f"--minutes is {self.minutes}, expected 0 to {_MOST_MINUTES}")
        for name in self.drafter:
            method = registry.drafters.parse(name)
            if method.exactness is not Exactness.EXACT:
                raise RequestError(
                    f"the drafter {method.name} may change outputs, and a plan's drafter must "
                    "not; name another"
                )

    def question(self) -> PlanQuestion:
        """Return on what is measured.

        Raises:
            RequestError: a file cannot be read, or holds nothing.
        """
        from paceline.measuring.evaluation.texts import read_documents
        from paceline.measuring.prompts import read_prompts
        from paceline.planning.default_text import default_dialogues, default_text
        from paceline.planning.plan_job import PlanQuestion

        if self.for_ is None:
            dialogues = default_dialogues()
        else:
            dialogues = read_prompts(self.for_, self.limit)
        return PlanQuestion(
            dialogues[: self.limit],
            default_text() if self.text is None else "".join(read_documents(self.text)),
            self.text is not None,
            self.max_new_tokens,
            self.temperature,
            self.judge,
        )


Out = Annotated[Path, typer.Option(help="File of the plan, for --plan of other verbs.")]
Html = Annotated[Path | None, typer.Option(help="Write the report to this HTML file, too.")]


def plan(
    model: options.Model,
    *,
    goal: GoalOptions,
    planning: PlanningOptions,
    out: Out = Path("plan.toml"),
    html: Html = None,
    json: options.Json = False,
) -> None:
    """Find the fastest setup of a model for this machine that reaches a goal.

    Measures what is unknown within the minutes, predicts the rest, and runs the best setups in
    turns. Measurements are kept: the same command goes on where it was. Later runs with the model
    and no other options use the plan.
    """
    from paceline.planning.plan_document import notes, plan_document, plan_table
    from paceline.planning.plan_file import keep_plan
    from paceline.planning.plan_job import PlanJob

    asked = goal.goal()
    planning.check()
    check_plan_target(out)
    check_target(html)
    job = PlanJob(
        model,
        asked,
        planning.question(),
        planning.minutes,
        planning.checkpoint,
        planning.drafter,
        say,
    )
    result = job.run()
    show(plan_table(result), stdout=not json)
    for line in notes(result):
        say(line)
    try:
        save_text(out, result.plan.to_toml())
    except UnicodeEncodeError:
        raise RequestError(f"the path {model!r:.80} is no Unicode; rename it") from None
    keep_plan(result.plan)
    if html is not None:
        from paceline.planning.plan_report import plan_page

        save_text(html, plan_page(result))
    if json:
        document(plan_document(result))
        return
    for row in result.plan.rows:
        say(row.setup.command())
    say(f"the plan is in {out}: paceline generate --plan {out} PROMPT")


def check_plan_target(path: Path) -> None:
    """Refuse to overwrite a file that is no plan.

    Raises:
        PacelineError: it cannot be written, or is something else.
    """
    from paceline.planning.plan_file import SCHEMA

    check_target(path)
    if path.exists():
        with path.open("rb") as file:
            if SCHEMA.encode() not in file.read(400):
                raise RequestError(f"{path} is there and is no plan; name another file with --out")


def parse_size(option: str, text: str) -> int:
    """Return a number of bytes.

    Raises:
        RequestError: it is malformed, or 0.
    """
    try:
        size = Size.parse(text)
    except ValueError as error:
        raise RequestError(f"{option} is {text!r:.40}: {error}") from None
    if size < 1:
        raise RequestError(f"{option} is {text!r:.40}: expected more than 0 bytes")
    return int(size)


def parse_tokens(option: str, text: str) -> int:
    """Return a number of tokens, written as `8192` or `8k`.

    Raises:
        RequestError: it is malformed.
    """
    found = re.fullmatch(r"(\d{1,9})(k?)", text.strip(), re.I)
    if not found:
        raise RequestError(f"{option} is {text!r:.40}, expected a number of tokens, e.g. 8k")
    return int(found[1]) * (1024 if found[2] else 1)
