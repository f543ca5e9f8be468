"""`paceline serve --plan`: the settings of a plan, or measurements while the server is idle."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.cli.output import say
from paceline.cli.plan_options import FIELDS, announcement, known_plan, open_plan

if TYPE_CHECKING:
    from paceline.planning.plan_file import PlanRow
    from paceline.serving.service import Service
    from paceline.serving.settings import ServerSettings

AUTO = "auto"
# Settings of how a model is run: a known plan is used where none of them is given.
_RUNNING = frozenset(
    {
        *("plan", "drafter", "budget", "engine", "format", "kv_format", "rope", "device"),
        *("threads", "weight_memory", "weights_memory", "attention", "kv_policy"),
        *("kv_policy_choice", "prefix_cache_dir", "replicas", "pipeline", "ray"),
    }
)


def planned_settings(settings: ServerSettings, given: Collection[str]) -> ServerSettings:
    """Return the settings with those of a plan, where nothing else gives them.

    Args:
        settings: of flags, environment and file.
        given: names of those that are given.

    Raises:
        RequestError: the plan is damaged, or of another machine, model or version.
    """
    if settings.plan == AUTO:
        return settings
    if settings.plan is not None:
        plan = open_plan(Path(settings.plan), settings.model)
        return _merged(settings, plan.chosen, given)
    if settings.known_plan and settings.model is not None and not _RUNNING & set(given):
        known = known_plan(settings.model)
        if known is not None:
            say(announcement(known))
            return _merged(settings, known.chosen, given)
    return settings


def _merged(settings: ServerSettings, row: PlanRow, given: Collection[str]) -> ServerSettings:
    setup = row.setup
    values = {name: getattr(setup, name) for name in FIELDS.values() if name not in given}
    if "budget" in values:
        values["budget"] = str(values["budget"])
    return replace(settings, model=setup.model, name=settings.name or _name(settings), **values)


def _name(settings: ServerSettings) -> str | None:
    """Return the name that the API would give the model, whichever checkpoint the plan takes."""
    if settings.model is None:
        return None
    from paceline.models import load

    return load(settings.model).name


def tune_while_idle(service: Service, given: Collection[str]) -> None:
    """Let a server measure while it is idle, and switch what changes no answer.

    What is given stays: a drafter, a budget, a number of threads.
    """
    from paceline.planning.idle_tuning import IdleTuner

    tuner = IdleTuner(
        service.worker,
        drafter="drafter" not in given,
        budget="budget" not in given,
        threads="threads" not in given,
    )
    service.idle_tasks.append(tuner)
    service.observers.append(tuner)
