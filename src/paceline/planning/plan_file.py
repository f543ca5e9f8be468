"""Plans as files: `plan.toml`, what it must match, and the plans that are kept on this machine."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from paceline import __version__
from paceline.errors import PacelineError, RequestError
from paceline.models import Model, load
from paceline.planning.measurement_store import machine_facts, plans_folder, short_hash
from paceline.planning.setups import Goal, Setup
from paceline.planning.toml_text import to_toml

SCHEMA = "paceline-plan/1"
_SIZE = 1 << 20  # bytes of a plan file, at most


@dataclass(frozen=True)
class PlanRow:
    """One setup of a plan.

    Attributes:
        setup: the setup.
        fingerprint: of its checkpoint.
        exact: it changes no output.
        memory: bytes at the wanted context and users.
        predicted: tokens a second by the cost model.
        speed, low, high: tokens a second end to end, with a 95 % interval; None if not run.
        first_token: seconds.
        loss, loss_error: against the model as it is stored, with the standard error; None if
            unknown.
        needs: what else it needs.
    """

    setup: Setup
    fingerprint: str
    exact: bool
    memory: int
    predicted: float
    speed: float | None = None
    low: float | None = None
    high: float | None = None
    first_token: float | None = None
    loss: float | None = None
    loss_error: float | None = None
    needs: str = ""

    def document(self) -> dict[str, Any]:
        """Return the row, for JSON and TOML."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        del own["setup"]
        return {**self.setup.document(), **{k: v for k, v in own.items() if v is not None}}


@dataclass(frozen=True)
class SetupPlan:
    """A plan: the chosen setup first, then its rivals.

    Attributes:
        model: path of the model, as it was given.
        name: of the model.
        fingerprint: of the model.
        goal: that it reaches.
        rows: the setups.
        machine: facts of the machine that it was made on.
        version: of Paceline.
    """

    model: str
    name: str
    fingerprint: str
    goal: Goal
    rows: tuple[PlanRow, ...]
    machine: Mapping[str, Any] = field(default_factory=machine_facts)
    version: str = __version__

    @property
    def chosen(self) -> PlanRow:
        """Return the row of the chosen setup."""
        return self.rows[0]

    def document(self) -> dict[str, Any]:
        """Return the plan, for JSON and TOML."""
        return {
            "schema": SCHEMA,
            "version": self.version,
            "model": {"path": self.model, "name": self.name, "fingerprint": self.fingerprint},
            "machine": dict(self.machine),
            "goal": self.goal.document(),
            "setups": [row.document() for row in self.rows],
        }

    def to_toml(self) -> str:
        """Return the text of `plan.toml`."""
        head = "# Made by `paceline plan`; the first setup is the chosen one.\n"
        return head + to_toml(self.document())

    def check(self, model: Model | None = None) -> None:
        """Refuse a plan of another machine, version or model.

        Args:
            model: that is to run; None takes the plan's own.

        Raises:
            RequestError: names what differs.
        """
        again = "make one here with `paceline plan`"
        here = machine_facts()
        if dict(self.machine) != here:
            raise RequestError(
                f"the plan was made on {_machine_name(self.machine)}, and this is "
                f"{_machine_name(here)}{_difference(self.machine, here)}; {again}"
            )
        if self.version != __version__:
            raise RequestError(
                f"the plan was made by Paceline {self.version}, and this is {__version__}; {again}"
            )
        source = load(self.model) if model is None else model
        if source.fingerprint() != self.fingerprint:
            raise RequestError(
                f"the plan was made for {self.name}, and {source.name} is another model or has "
                f"changed; {again}"
            )
        setup = self.chosen.setup
        if setup.model != self.model and load(setup.model).fingerprint() != self.chosen.fingerprint:
            raise RequestError(f"{setup.model} has changed since the plan was made; {again}")


def read_plan(path: Path) -> SetupPlan:
    """Read a plan file.

    Raises:
        RequestError: it cannot be read, or is no plan.
    """
    try:
        if path.stat().st_size > _SIZE:
            raise RequestError(f"{path} is too large for a plan; `paceline plan` makes one")
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"cannot read the plan {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not valid TOML: {str(error).splitlines()[0]:.100}") from None
    if found.get("schema") != SCHEMA:
        raise RequestError(f"{path} is no plan of this version; make one with `paceline plan`")
    try:
        return _parse(found)
    except (LookupError, TypeError, ValueError, AttributeError, PacelineError) as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RequestError(
            f"{path} is a damaged plan ({what:.100}); make one with `paceline plan`"
        ) from None


def _parse(found: Mapping[str, Any]) -> SetupPlan:
    """Return the plan of a document, checked field by field."""
    model, goal = found["model"], found["goal"]
    texts = (model["path"], model["name"], model["fingerprint"], found["version"])
    if not all(isinstance(each, str) for each in texts):
        raise TypeError("model and version are texts")
    rows = tuple(map(_parse_row, found["setups"]))
    if not rows:
        raise ValueError("no setup")
    return SetupPlan(
        model["path"],
        model["name"],
        model["fingerprint"],
        Goal(**_typed(Goal, goal)),
        rows,
        dict(found["machine"]),
        found["version"],
    )


def _parse_row(found: Mapping[str, Any]) -> PlanRow:
    names = {each.name for each in fields(Setup)}
    setup = Setup(**_typed(Setup, {k: v for k, v in found.items() if k in names}))
    _check_setup(setup)
    rest = {k: v for k, v in found.items() if k not in names}
    return PlanRow(setup, **_typed(PlanRow, rest))


_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str,),
    "int": (int,),
    "int | None": (int,),
    "int | str": (int, str),
    "float": (int, float),
    "float | None": (int, float),
    "bool": (bool,),
}


def _typed(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values whose names and types are those of a dataclass's fields.

    Raises:
        ValueError: one is not.
    """
    known = {each.name: str(each.type) for each in fields(kind)}
    for name, value in values.items():
        kinds = _KINDS.get(known.get(name, ""), ())
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{name} is {value!r:.40}")
    return dict(values)


def _check_setup(setup: Setup) -> None:
    """Refuse names that do not exist and numbers that cannot be.

    Raises:
        PacelineError: says what is wrong.
        ValueError: likewise.
    """
    from paceline import registry
    from paceline.decoding.governor import Fixed
    from paceline.engines.native import KV_FORMATS
    from paceline.kvcache.base import parse_policy

    registry.drafters.parse(setup.drafter)
    if setup.budget != "auto":
        if not isinstance(setup.budget, int):
            raise ValueError(f"budget is {setup.budget!r:.40}")
        Fixed(setup.budget)
    if setup.kv_format not in ("auto", *KV_FORMATS):
        raise ValueError(f"kv_format is {setup.kv_format!r:.40}")
    if setup.kv_policy is not None:
        parse_policy(setup.kv_policy)
    if setup.attention is not None:
        registry.patterns.parse(setup.attention)
    if setup.threads is not None and not 1 <= setup.threads <= 1024:
        raise ValueError(f"threads is {setup.threads}")
    if setup.weights_memory is not None and setup.weights_memory < 1:
        raise ValueError(f"weights_memory is {setup.weights_memory}")


def keep_plan(plan: SetupPlan, folder: Path | None = None) -> None:
    """Keep a plan for `--model` without other options; a folder that cannot be written is none."""
    path = _kept_path(plan.fingerprint, folder)
    with suppress(OSError, ValueError):  # a path that is no Unicode
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_text(plan.to_toml(), encoding="utf-8")
        part.replace(path)


def kept_plan(model: Model, folder: Path | None = None) -> SetupPlan | None:
    """Return the plan that was kept of a model for this machine and version, if there is one.

    One that is damaged, or whose checkpoint has changed, counts as none.
    """
    with suppress(PacelineError):
        path = _kept_path(model.fingerprint(), folder)
        if path.is_file():
            plan = read_plan(path)
            plan.check(model)
            return plan
    return None


def any_kept(folder: Path | None = None) -> bool:
    """Return whether any plan is kept, so that those who have none need not read a model for it."""
    return next(_kept_folder(folder).glob("*.toml"), None) is not None


def _kept_folder(folder: Path | None) -> Path:
    return (plans_folder() if folder is None else folder) / "kept"


def _kept_path(fingerprint: str, folder: Path | None) -> Path:
    key = short_hash([__version__, machine_facts(), fingerprint])
    return _kept_folder(folder) / f"{key}.toml"


def _machine_name(facts: Mapping[str, Any]) -> str:
    cores = facts.get("usable_cores", "?")
    return f"{facts.get('processor', 'an unknown processor')!s:.60} with {cores} cores"


def _difference(before: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Return which facts differ where names and cores are the same."""
    if _machine_name(before) != _machine_name(here):
        return ""
    names = [name for name in here if before.get(name) != here[name]]
    return f" with other {' and '.join(name.replace('_', ' ') for name in names)}" if names else ""
