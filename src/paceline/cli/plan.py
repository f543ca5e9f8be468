"""`paceline plan`: the fastest exact, or the smallest good enough, setup for this machine."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.byte_sizes import Size
from paceline.cli import options
from paceline.cli.output import check_target, document, save_text, say, show
from paceline.errors import RequestError

if TYPE_CHECKING:
    from paceline.core import Request
    from paceline.lm import LM
    from paceline.measuring.prompts import Dialogue
    from paceline.planning.lab import Lab
    from paceline.planning.measurer import EngineMeasurer
    from paceline.planning.plan_search import SourceFacts
    from paceline.planning.planner import PlanResult
    from paceline.planning.setups import Goal, Setup
    from paceline.planning.verification import ModelRunner

_DEFAULT_LOSS = 0.02
_MEASURING = 0.6  # share of the minutes after which nothing more is measured before verifying
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

    def dialogues(self) -> list[Dialogue]:
        """Return the prompts."""
        from paceline.measuring.prompts import read_prompts
        from paceline.planning.default_text import default_dialogues

        if self.for_ is None:
            return default_dialogues()[: self.limit]
        return read_prompts(self.for_, self.limit)

    def loss_text(self) -> str:
        """Return the text on which losses are measured."""
        from paceline.measuring.evaluation.texts import read_documents
        from paceline.planning.default_text import default_text

        return default_text() if self.text is None else "".join(read_documents(self.text))


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

    asked = goal.goal()
    planning.check()
    check_plan_target(out)
    check_target(html)
    result = make_plan(model, asked, planning)
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


def make_plan(model: str, goal: Goal, planning: PlanningOptions) -> PlanResult:
    """Return the plan of a goal, with real measurements.

    Raises:
        PacelineError: the model or a file cannot be used, or nothing reaches the goal.
    """
    from paceline.engines.ensemble import parse_ensemble
    from paceline.machine import free_bytes
    from paceline.planning.measurer import EngineMeasurer
    from paceline.planning.plan_search import PlanSearch
    from paceline.planning.planner import Planner
    from paceline.planning.verification import Verification

    if len(parse_ensemble(model)) > 1:
        raise RequestError("a plan is of one model, and several are named; name one")
    start, seconds = monotonic(), 60 * planning.minutes
    measurer = EngineMeasurer(
        model,
        planning.dialogues(),
        planning.loss_text(),
        planning.text is not None,
        planning.max_new_tokens,
        planning.temperature,
        planning.judge,
    )
    lab = _lab(model, measurer, planning, start + _MEASURING * seconds)
    search = PlanSearch(
        goal,
        source_facts(model, measurer),
        lab,
        measurer.prompts,
        _others(measurer, model, planning, goal),
        planning.drafter,
        planning.text is not None,
    )

    def opened(setup: Setup) -> ModelRunner:
        from paceline.planning.verification import ModelRunner

        measurer.close()  # its models are not needed beside those that are run
        return ModelRunner(setup, _requests(measurer), goal.users)

    verification = None
    if planning.minutes > 0:
        verification = Verification(opened, lab.watch, start + seconds)
    return Planner(search, verification, measurer.fingerprint, free_bytes(), say).run()


def _requests(measurer: EngineMeasurer) -> Any:
    def requests(lm: LM) -> list[Request]:
        return measurer.requests(lm)

    return requests


def _lab(model: str, measurer: EngineMeasurer, planning: PlanningOptions, deadline: float) -> Lab:
    from paceline.planning.busy_watch import BusyWatch
    from paceline.planning.lab import Lab
    from paceline.planning.measurement_store import MeasurementStore, short_hash

    question = short_hash([measurer.question, planning.judge])
    return Lab(
        model,
        MeasurementStore(measurer.fingerprint(model), say=say),
        measurer,
        BusyWatch(say=say),
        deadline,
        (question,),
        bool(planning.judge),
        say=say,
    )


def source_facts(model: str, measurer: EngineMeasurer) -> SourceFacts:
    """Return what is known of a model before anything runs."""
    from paceline.engines.native import default_threads
    from paceline.machine import usable_cores
    from paceline.planning.measurer import page_bytes, parameters
    from paceline.planning.plan_search import SourceFacts

    checkpoint = measurer.model
    return SourceFacts(
        model,
        checkpoint.name,
        checkpoint.weights.nbytes(),
        parameters(checkpoint),
        page_bytes(checkpoint),
        checkpoint.config.vocab_size,
        checkpoint.config.context,
        usable_cores(),
        default_threads(),
    )


def _others(
    measurer: EngineMeasurer, model: str, planning: PlanningOptions, goal: Goal
) -> dict[str, int]:
    """Return other checkpoints of the same base with their bytes."""
    from paceline.planning.candidates import checkpoints_here

    found = {}
    for path in planning.checkpoint:
        measurer.check_tokens(path)
        if path != model:
            found[path] = measurer.checkpoint(path).weights.nbytes()
    if not goal.exact:
        for path in checkpoints_here(measurer.model, model):
            found.setdefault(path, measurer.checkpoint(path).weights.nbytes())
    if found and goal.exact:
        raise RequestError("--exact runs the model as it is stored; leave out --checkpoint")
    return found


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
