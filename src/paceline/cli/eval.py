"""`paceline eval`: how well a model does on texts and benchmark suites, paired against another."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli import evaluation, options
from paceline.cli.output import say, show
from paceline.cli.progress import counting
from paceline.errors import RequestError

if TYPE_CHECKING:
    from paceline.lm import LM
    from paceline.measuring.evaluation.plan import SuiteSettings


@dataclass(frozen=True)
class SuiteOptions:
    """Texts and suites."""

    text: Annotated[
        list[Path],
        typer.Option(
            help="Text file, plain or .jsonl with `text`, or either with .gz; repeatable."
        ),
    ] = field(default_factory=list)
    suite: Annotated[
        list[str],
        typer.Option(
            help="blimp, lambada, gsm8k, mbpp, long, babilong, squad, or lm_eval:TASK of "
            "lm-evaluation-harness; repeatable."
        ),
    ] = field(default_factory=list)
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of the suites' data, each in a folder of its name or in itself."),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Only the first N items: pairs of each paradigm (blimp), windows (texts), "
            "contexts of each kind (long; 20 by default), else problems.",
        ),
    ] = None
    prefix: Annotated[
        str | None,
        typer.Option(
            help="Token before texts of blimp, lambada and long: auto (the tokenizer's), none, or "
            "its text; auto by default."
        ),
    ] = None
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of a context of long; 2048 by default, or three quarters of what the "
            "model sees.",
        ),
    ] = None
    shots: Annotated[
        int | None,
        typer.Option(min=0, max=100, help="Solved examples: 5 for gsm8k and 3 for mbpp."),
    ] = None
    chat: options.Chat = False
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum tokens of an answer; 400 by default.")
    ] = None
    allow_code: Annotated[
        bool,
        typer.Option(
            "--allow-code",
            help="Run programs that the model writes, in a sandbox (mbpp), and tasks of --data/"
            "lm_eval.",
        ),
    ] = False
    seed: options.PlainSeed = 0

    def settings(self) -> SuiteSettings:
        """Return the settings as the suites take them."""
        from paceline.measuring.evaluation.plan import SuiteSettings

        return SuiteSettings(**{each.name: getattr(self, each.name) for each in fields(self)})


@dataclass(frozen=True)
class EvaluatedEngineOptions:
    """Model."""

    engine: Annotated[str, typer.Option(help="auto, native, reference or static.")] = "auto"
    device: Annotated[str | None, typer.Option(help="Device of the torch engines, e.g. cuda.")] = (
        None
    )
    threads: options.Threads = None
    weight_format: Annotated[
        str,
        typer.Option("--format", help="Weight format of MODEL: auto (as stored), int8, int4, ..."),
    ] = "auto"
    base_format: Annotated[str, typer.Option(help="Weight format of the base.")] = "auto"
    kv_format: Annotated[
        str, typer.Option(help="Format of MODEL's cached keys and values; the base's is fp32.")
    ] = "auto"
    memory: options.Memory = None
    weights_memory: options.WeightsMemory = None
    rope: Annotated[
        str | None,
        typer.Option(
            help="Extend MODEL's context: yarn:factor=2, linear:factor=2, dynamic:factor=2, or "
            "dual_chunk:factor=2 with --engine reference."
        ),
    ] = None
    kv_policy: Annotated[
        str | None,
        typer.Option(help="KV policy of MODEL, NAME:key=value,...; the base has none."),
    ] = None
    attention: Annotated[
        str | None,
        typer.Option(help="Attention pattern of MODEL, NAME:key=value,...; lossy."),
    ] = None
    exits: Annotated[
        str | None,
        typer.Option(help="Exit policy of MODEL, NAME:key=value,...; lossy."),
    ] = None

    def open(self, model: str, generates: bool) -> LM:
        """Open the model that is evaluated."""
        from paceline.lm import LM

        drafter, budget = _drafting(generates)
        return LM(
            model,
            dtype=self.weight_format,
            kv_format=self.kv_format,
            memory=self.memory,
            weights_memory=self.weights_memory,
            attention=self.attention,
            exits=self.exits,
            rope=self.rope,
            kv_policy=self.kv_policy,
            engine=self.engine,
            threads=self.threads,
            device=self.device,
            drafter=drafter,
            budget=budget,
        )

    def open_base(self, model: str, generates: bool) -> LM:
        """Open the base, in the same engine."""
        from paceline.lm import LM

        drafter, budget = _drafting(generates)
        return LM(
            model,
            dtype=self.base_format,
            engine=self.engine,
            threads=self.threads,
            device=self.device,
            drafter=drafter,
            budget=budget,
        )


def _drafting(generates: bool) -> tuple[str, int | str]:
    """Return drafter and budget: drafts make answers faster, and change none."""
    return ("blend", "auto") if generates else ("plain", 1)


def eval(  # noqa: A001 (the name of the verb)
    model: options.Model,
    *,
    base: Annotated[str | None, typer.Option(help="Model to compare with, item by item.")] = None,
    suites: SuiteOptions,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Score again what an earlier run left.")
    ] = False,
    engine: EvaluatedEngineOptions,
    report: evaluation.ReportOptions,
) -> None:
    """Evaluate a model on texts and suites, with standard errors, and paired against a base.

    Results of items are kept in the cache folder: an interrupted run goes on where it was when the
    same command is given again. Answers are greedy.
    """
    report.check()
    if base is None and engine.base_format != "auto":
        raise RequestError("--base-format is of --base, which is not given")
    from paceline.cache_dir import cache_folder
    from paceline.measuring.evaluation.plan import EvaluationPlan
    from paceline.measuring.evaluation.tables import evaluation_tables

    settings = suites.settings()
    if engine.kv_policy is not None:
        settings.check_policy()
    plan = EvaluationPlan.make(settings, model, base)
    generates = plan.generates
    record = plan.run(
        lambda: engine.open(model, generates),
        None if base is None else lambda: engine.open_base(base, generates),
        counting,
        cache_folder() / "evaluations",
        fresh,
    )
    earlier = sum(suite["earlier"] for suite in record["suites"])
    if earlier:
        say(f"{earlier} items were scored by an earlier run; --fresh scores them again")
    show(evaluation_tables(record), stdout=not report.json)
    report.deliver(record)
