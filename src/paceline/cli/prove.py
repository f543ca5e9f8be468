"""`paceline prove`: every output against plain decoding, token by token."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.cli import evaluation, options, parsing
from paceline.cli.output import say, show
from paceline.cli.progress import counting
from paceline.errors import MethodError

if TYPE_CHECKING:
    from paceline.decoding.governor import Budget
    from paceline.lm import LM
    from paceline.measuring.baseline import Asking
    from paceline.measuring.proof import Proof

_SHOWN = 10  # differences on the screen; the document holds all


@dataclass(frozen=True)
class Questions(evaluation.Questions):
    """What is asked."""

    chat: options.Chat = False


@dataclass(frozen=True)
class Comparing:
    """What is compared."""

    drafters: options.Drafters = field(default_factory=lambda: ["all"])
    temperatures: Annotated[str, typer.Option(help="Separated by commas.")] = "0,0.7,1.0"
    max_new_tokens: options.NewTokens = 64
    budget: options.Budget = "16"
    seed: options.Seed = 0
    watermark: options.Watermark = None
    walk: options.Walk = "gumbel"
    reload: Annotated[
        bool,
        typer.Option("--reload", help="Save and load what drafters learnt between prompts."),
    ] = False

    @property
    def heats(self) -> list[float]:
        """The temperatures, read.

        Raises:
            PacelineError: one is no number of 0 or more.
        """
        return parsing.numbers("--temperatures", self.temperatures)

    def sizes(self, lm: LM) -> Budget:
        """What sizes the trees of one drafter."""
        from paceline.decoding.governor import Fixed, Governor
        from paceline.engines.cost_cache import known_cost

        nodes = parsing.one_budget(self.budget)
        return Fixed(nodes) if isinstance(nodes, int) else Governor(known_cost(lm.engine))


def prove(
    model: options.Models,
    *,
    questions: Questions,
    comparing: Comparing,
    following: options.Following,
    engine: options.EngineChoice,
    report: evaluation.Report,
) -> None:
    """Prove that no drafter changes a token; exit 1 if one does.

    Each turn of a line is a prompt whose context is the earlier turns and plain decoding's answers.
    Prompts that do not fit the context keep their last tokens and are counted as clipped.
    Drafters keep what they learnt from prompt to prompt.
    """
    refuse(comparing.walk, comparing.drafters)
    heats, nodes = comparing.heats, parsing.one_budget(comparing.budget)
    mark, rules = options.one_watermark(comparing.watermark), following.rules()
    report.check()
    job = evaluation.prepare(model, questions, comparing.drafters, engine)
    from paceline.measuring import proof
    from paceline.measuring.baseline import Asking
    from paceline.measuring.report.document import conditions, proof_document, proof_table

    new, seed, chat = comparing.max_new_tokens, comparing.seed, questions.chat
    asking = Asking(
        new, seed=seed, chat=chat, grammar=rules, watermark=mark, guide=following.guides
    )
    sizes = partial(comparing.sizes, job.lm)
    with counting(job.turns * len(heats)) as tick:
        result = proof.prove(
            job.lm, job.methods, job.dialogues, heats, asking, sizes, tick, comparing.reload
        )
    found = {
        **proof_document(result),
        "state": "reloaded" if comparing.reload else "carried",
        "left_out": job.left_out,
        "settings": settings(questions, asking, heats, nodes, job),
        **conditions(job.lm, model),
    }
    show(proof_table(result), stdout=not report.json)
    tell(result, found, job)
    report.deliver(found)
    if found["bugs"]:
        raise typer.Exit(1)


def refuse(walk: str, drafters: list[str]) -> None:
    """Refuse what cannot be compared token by token.

    Raises:
        MethodError: another walk than plain decoding's, or a lossy drafter.
    """
    if walk != "gumbel":
        raise MethodError(
            f"--walk {walk} cannot be proven by comparing tokens: the rejection walk keeps their "
            "law only, which its statistical test checks; use --walk gumbel"
        )
    for name in parsing.lossy(parsing.find_drafters(drafters)[0]):
        raise MethodError(f"{name} is lossy: its output is not plain decoding's; leave it out")


def settings(
    questions: Questions, asking: Asking, heats: list[float], nodes: int | str, job: evaluation.Work
) -> dict[str, Any]:
    """What was asked for, as the document tells it."""
    return {
        "file": str(questions.prompts),
        "lines": len(job.dialogues),
        "turns": job.turns,
        "temperatures": heats,
        "max_new_tokens": asking.max_new_tokens,
        "budget": nodes,
        "seed": asking.seed,
        "chat": asking.chat,
        "guide": list(asking.guide),
        "grammar": asking.grammar and asdict(asking.grammar),
        "watermark": asking.watermark and asking.watermark.name,
    }


def tell(result: Proof, found: dict[str, Any], job: evaluation.Work) -> None:
    """Say what differs, what was left out, and the counts."""
    for finding in result.findings[:_SHOWN]:
        say(str(finding))
    job.tell(result.clipped, result.prompts)
    say(
        f"{found['pairs']} pairs: {found['identical']} identical, {found['ties']} ties, "
        f"{found['bugs']} bugs; drafters carried over what they learnt"
    )
