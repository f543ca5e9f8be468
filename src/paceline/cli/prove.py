"""`paceline prove`: every output against plain decoding, token by token."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.cli import evaluation, options, parsing
from paceline.cli.output import say, show
from paceline.cli.progress import counting
from paceline.compatibility import Side, check
from paceline.errors import MethodError

if TYPE_CHECKING:
    from paceline.decoding.governor import Budget
    from paceline.lm import LM
    from paceline.measuring.baseline import TurnOptions
    from paceline.measuring.proof import Proof

_SHOWN = 10  # differences on the screen; the document holds all


@dataclass(frozen=True)
class ProofPromptOptions(evaluation.PromptOptions):
    """Prompts."""

    chat: options.Chat = False


@dataclass(frozen=True)
class ComparisonOptions:
    """Comparison."""

    drafters: options.Drafters = field(default_factory=lambda: ["all"])
    temperatures: Annotated[str, typer.Option(help="Separated by commas.")] = "0,0.7,1.0"
    max_new_tokens: options.NewTokens = 64
    budget: options.Budget = "16"
    seed: options.Seed = 0
    watermark: options.Watermark = None
    walk: options.Walk = "gumbel"
    reload: Annotated[
        bool,
        typer.Option("--reload", help="Save and load the drafters' state between prompts."),
    ] = False

    @property
    def temperature_values(self) -> list[float]:
        """Return the temperatures as numbers.

        Raises:
            PacelineError: one is no number of 0 or more.
        """
        return parsing.numbers("--temperatures", self.temperatures)

    def sizes(self, lm: LM) -> Budget:
        """Return a new budget for one drafter."""
        from paceline.decoding.governor import Fixed, Governor
        from paceline.engines.cost_cache import cost_of

        nodes = parsing.one_budget(self.budget)
        return Fixed(nodes) if isinstance(nodes, int) else Governor(cost_of(lm.engine))


def prove(
    model: options.Models,
    *,
    prompt_options: ProofPromptOptions,
    comparison: ComparisonOptions,
    constraints: options.ConstraintOptions,
    engine: options.EngineOptions,
    report: evaluation.ReportOptions,
) -> None:
    """Prove that no drafter changes a token; exit 1 if one does.

    Each turn of a line is a prompt whose context is the earlier turns and plain decoding's answers.
    Prompts that do not fit the context keep their last tokens and are counted as clipped.
    Drafters keep what they learned from prompt to prompt.
    """
    refuse(comparison.walk, comparison.drafters)
    temperatures, nodes = comparison.temperature_values, parsing.one_budget(comparison.budget)
    mark, rules = options.one_watermark(comparison.watermark), constraints.rules()
    report.check()
    job = evaluation.prepare(model, prompt_options, comparison.drafters, engine)
    from paceline.measuring import proof
    from paceline.measuring.baseline import TurnOptions
    from paceline.measuring.report.document import conditions, proof_document, proof_table

    new, seed, chat = comparison.max_new_tokens, comparison.seed, prompt_options.chat
    asking = TurnOptions(
        new, seed=seed, chat=chat, grammar=rules, watermark=mark, guide=constraints.guides
    )
    sizes = partial(comparison.sizes, job.lm)
    outputs = job.turns * len(temperatures) * (1 + len(job.methods))
    with counting(outputs, "outputs") as tick:
        result = proof.prove(
            job.lm, job.methods, job.dialogues, temperatures, asking, sizes, tick, comparison.reload
        )
    record = {
        **proof_document(result),
        "state": "reloaded" if comparison.reload else "carried",
        "left_out": job.left_out,
        "settings": settings(prompt_options, asking, temperatures, nodes, job),
        **conditions(job.lm, model),
    }
    show(proof_table(result), stdout=not report.json)
    report_result(result, record, job)
    report.deliver(record)
    if record["bugs"]:
        raise typer.Exit(1)


def refuse(walk: str, drafters: list[str]) -> None:
    """Refuse what cannot be compared token by token.

    Raises:
        MethodError: another walk than plain decoding's, or a lossy drafter.
    """
    if walk not in ("gumbel", "rejection"):
        raise MethodError(f"the walk is {walk!r}, expected gumbel or rejection")
    if walk == "rejection":
        check({Side.REJECTION: "--walk rejection", Side.COMPARISON: "a proof token by token"})
    for name in parsing.lossy(parsing.find_drafters(drafters)[0]):
        drafter = f"the lossy drafter {name}"
        check({Side.LOSSY_DRAFTER: drafter, Side.COMPARISON: "a proof token by token"})


def settings(
    prompt_options: ProofPromptOptions,
    asking: TurnOptions,
    temperatures: list[float],
    nodes: int | str,
    job: evaluation.EvaluationJob,
) -> dict[str, Any]:
    """Return the settings as the document holds them."""
    return {
        "file": prompt_options.origin,
        "lines": len(job.dialogues),
        "turns": job.turns,
        "temperatures": temperatures,
        "max_new_tokens": asking.max_new_tokens,
        "budget": nodes,
        "seed": asking.seed,
        "chat": asking.chat,
        "guide": list(asking.guide),
        "grammar": asking.grammar and asdict(asking.grammar),
        "watermark": asking.watermark and asking.watermark.name,
    }


def report_result(result: Proof, record: dict[str, Any], job: evaluation.EvaluationJob) -> None:
    """Print the differences, what was left out, and the counts."""
    for finding in result.findings[:_SHOWN]:
        say(str(finding))
    job.report_omissions(result.clipped, result.prompts)
    say(
        f"{record['pairs']} pairs: {record['identical']} identical, {record['ties']} ties, "
        f"{record['bugs']} bugs; drafters carried over what they learnt"
    )
