"""`--plan FILE` of `generate` and `chat`, and the plan that this machine knows of a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from paceline.cli import options
from paceline.cli.output import say
from paceline.errors import PacelineError

if TYPE_CHECKING:
    from paceline.planning.plan_file import PlanRow, SetupPlan

# Options beside which a known plan is used: they say what to write, and not how to run.
_HARMLESS = frozenset(
    {
        *("words", "prompt", "model", "plan", "known_plan", "json", "check", "ignore_eos"),
        *("chat", "max_new_tokens", "temperature", "seed", "top_p", "top_k", "min_p", "stop"),
        *("repetition_penalty", "template", "system", "plain", "history"),
    }
)
# Options of the command line -> fields of a setup.
FIELDS = {
    "weight_format": "format",
    "drafter": "drafter",
    "budget": "budget",
    "kv_format": "kv_format",
    "kv_policy": "kv_policy",
    "attention": "attention",
    "threads": "threads",
}


class Planned(NamedTuple):
    """What a verb runs with.

    Attributes:
        model: path, or None for the default.
        engine: options of the engine.
        drafting: options of drafting.
    """

    model: str | None
    engine: options.EngineOptions
    drafting: Any


@dataclass(frozen=True)
class PlanOptions:
    """Plan."""

    plan: Annotated[
        Path | None,
        typer.Option(help="File of `paceline plan`; options that are given as well win."),
    ] = None
    known_plan: Annotated[
        bool,
        typer.Option(
            help="With a model and no options of how to run it, use the plan that was made of it "
            "on this machine."
        ),
    ] = True

    def apply(
        self,
        context: typer.Context,
        model: str | None,
        engine: options.EngineOptions,
        drafting: options.DraftOptions,
    ) -> Planned:
        """Return model and options as a plan has them, where the command line says nothing.

        Raises:
            RequestError: the plan is damaged, or of another machine, model or version.
        """
        given = given_options(context)
        if self.plan is not None:
            plan = open_plan(self.plan, model)
            return _merged(plan.chosen, given, engine, drafting)
        if self.known_plan and model is not None and given <= _HARMLESS:
            known = known_plan(model)
            if known is not None:
                say(announcement(known))
                return _merged(known.chosen, given, engine, drafting)
        return Planned(model, engine, drafting)


def given_options(context: typer.Context) -> set[str]:
    """Return the names of the options that the command line gives."""
    return {
        name
        for name in context.params
        if getattr(context.get_parameter_source(name), "name", "") in ("COMMANDLINE", "ENVIRONMENT")
    }


def open_plan(path: Path, model: str | None) -> SetupPlan:
    """Read a plan and refuse one that is of another machine, model or version.

    Raises:
        RequestError: as said, or the file is damaged.
    """
    from paceline.models import load
    from paceline.planning.plan_file import read_plan

    plan = read_plan(path)
    plan.check(None if model is None else load(model))
    return plan


def known_plan(model: str) -> SetupPlan | None:
    """Return the plan that this machine knows of a model; None where there is none."""
    from paceline.engines.ensemble import parse_ensemble
    from paceline.planning.plan_file import any_kept, kept_plan

    if not any_kept():
        return None
    from paceline.models import load

    try:
        if len(parse_ensemble(model)) > 1:
            return None
        return kept_plan(load(model))
    except PacelineError:  # told where the model is opened
        return None


def announcement(plan: SetupPlan) -> str:
    """Return the line that tells that a known plan is used."""
    chosen = plan.chosen
    lossy = "" if chosen.exact else f" (lossy: {chosen.loss or 0.0:.4f})"
    return (
        f"using the plan of this machine for {plan.name}: {chosen.setup.title}{lossy}; "
        "--no-known-plan leaves it out"
    )


def _merged(
    row: PlanRow, given: set[str], engine: options.EngineOptions, drafting: options.DraftOptions
) -> Planned:
    setup = row.setup
    values = {name: getattr(setup, own) for name, own in FIELDS.items() if name not in given}
    draft = {name: str(values.pop(name)) for name in ("drafter", "budget") if name in values}
    return Planned(setup.model, replace(engine, **values), replace(drafting, **draft))
