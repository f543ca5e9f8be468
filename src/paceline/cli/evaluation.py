"""What `prove`, `bench` and `load` share: prompts, models and drafters before; a document after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.cli import options, parsing
from paceline.cli.output import check_target, document, save, say
from paceline.errors import RequestError

if TYPE_CHECKING:
    from paceline.drafters.base import DraftMethod
    from paceline.lm import LM
    from paceline.measuring.prompts import Dialogue


@dataclass(frozen=True)
class PromptOptions:
    """Prompts."""

    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A .jsonl file with `prompt` or `turns` (and `category`), or a prompt a line; "
            "24 questions of several kinds by default."
        ),
    ] = None
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first N lines; all turns of a line count.")
    ] = None

    @property
    def file(self) -> Path:
        """Return the file of the prompts: the one named, or the questions in this package."""
        from paceline.measuring.prompts import QUESTIONS

        return QUESTIONS if self.prompts is None else self.prompts

    @property
    def origin(self) -> str:
        """Return where the prompts come from, for documents."""
        return "built-in questions" if self.prompts is None else str(self.prompts)

    def read(self) -> list[Dialogue]:
        """Return the lines of the file.

        Raises:
            RequestError: it cannot be read, or holds no prompts.
        """
        from paceline.measuring.prompts import read_prompts

        return read_prompts(self.file, self.limit)


@dataclass(frozen=True)
class SuiteOptions(PromptOptions):
    """Prompts."""

    suite: Annotated[
        str | None, typer.Option(help="Suite that the prompts belong to: spec-bench.")
    ] = None

    def read(self) -> list[Dialogue]:
        """Return the lines of the file, or those of a suite's tasks.

        Raises:
            RequestError: as `PromptOptions.read`, or there is no such suite.
        """
        return self.read_tasks(())

    def read_tasks(self, tasks: Sequence[str]) -> list[Dialogue]:
        """Return the lines of some tasks; none named takes all.

        Raises:
            RequestError: as `read`, there is no such task, or a suite is named without its file.
        """
        from paceline.measuring.suites import read_tasks

        if self.suite is not None and self.prompts is None:
            raise RequestError("--suite names the tasks of a prompt file; name it with --prompts")
        return read_tasks(self.file, self.limit, self.suite, tasks)


@dataclass(frozen=True)
class ReportOptions:
    """Results."""

    out: Annotated[Path | None, typer.Option(help="Write the JSON document to this file, too.")] = (
        None
    )
    json: options.Json = False

    def check(self) -> None:
        """Refuse, before the work begins, a path that cannot be written.

        Raises:
            PacelineError: see `check_target`.
        """
        check_target(self.out)

    def deliver(self, record: dict[str, Any]) -> None:
        """Write the document where it was requested."""
        if self.out:
            save(self.out, record)
        if self.json:
            document(record)


@dataclass(frozen=True)
class EvaluationJob:
    """A model, drafters and prompts, ready to be measured.

    Attributes:
        lm: engine and tokenizer.
        dialogues: lines of the prompt file.
        turns: prompts in them.
        methods: drafters by name.
        left_out: drafters of `all` that need something that was not given.
    """

    lm: LM
    dialogues: list[Dialogue]
    turns: int
    methods: dict[str, DraftMethod]
    left_out: list[str]

    def report_omissions(self, clipped: int, of: int) -> None:
        """Print what was left out and clipped."""
        for name in self.left_out:
            say(f"left out {name}: it needs something; name it with its settings")
        if clipped:
            say(f"{clipped} of {of} prompts were clipped to fit the context")


def prepare(
    model: str, prompts: PromptOptions, drafters: list[str], engine: options.EngineOptions
) -> EvaluationJob:
    """Read prompts, drafters and model; refuse here, before the long part, what cannot work."""
    dialogues = prompts.read()
    methods, left_out = parsing.find_drafters(drafters)
    lm = engine.open(model)
    turns = sum(len(dialogue.turns) for dialogue in dialogues)
    return EvaluationJob(lm, dialogues, turns, methods, left_out)
