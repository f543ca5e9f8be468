"""What a registered method says about itself, as data for the CLI and the documentation."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any, get_type_hints

from paceline.abilities import Ability
from paceline.features import SHARED, Claim, coverage
from paceline.registry import FAMILIES, Registry, required

_FIELD = re.compile(r"^(\w+(?:, \w+)*): ")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of a method.

    Attributes:
        name: as users write it.
        type: `int`, `float`, `bool`, `str`, or another type as Python writes it.
        default: None also where the setting is required.
        required: whether it has no default.
        doc: meaning, unit and limits.
    """

    name: str
    type: str
    default: Any
    required: bool
    doc: str


def settings(method: type[Any]) -> list[Setting]:
    """Return the settings of a method.

    An inherited one that is undocumented, or documented `as of` another, has its base's text.
    """
    hints, missing = get_type_hints(method), required(method)
    docs: dict[str, str] = {}
    for kind in reversed(method.__mro__):
        own = _attributes(kind)
        docs |= {k: v for k, v in own.items() if k not in docs or not v.startswith("as of ")}
    return [
        Setting(
            each.name,
            getattr(hints[each.name], "__name__", "")
            if isinstance(hints[each.name], type)
            else str(hints[each.name]),
            None if each.name in missing else _default(each),
            each.name in missing,
            docs.get(each.name, ""),
        )
        for each in dataclasses.fields(method)
        if each.init
    ]


def _default(each: dataclasses.Field[Any]) -> Any:
    if each.default_factory is not dataclasses.MISSING:
        return each.default_factory()
    return each.default


def _attributes(kind: type[Any]) -> dict[str, str]:
    """Return the texts of a class's own `Attributes:` section by name."""
    lines = inspect.cleandoc(kind.__dict__.get("__doc__") or "").split("\n")
    docs: dict[str, str] = {}
    names: list[str] = []
    inside = False
    for line in lines:
        if not line.startswith(" "):
            inside = line == "Attributes:" or (inside and not line)
            continue
        match = _FIELD.match(line[4:]) if inside else None
        if match:
            names = match[1].split(", ")
            docs |= dict.fromkeys(names, line[4 + match.end() :])
        elif inside:
            docs |= {name: f"{docs[name]} {line.strip()}" for name in names}
    return docs


def summary(method: type[Any]) -> str:
    """Return the first sentence of a method's docstring."""
    return (method.__doc__ or "").partition("\n")[0]


def description(method: type[Any]) -> str:
    """Return a method's docstring without the section of its attributes."""
    text = inspect.cleandoc(method.__doc__ or "")
    return re.split(r"^Attributes:$", text, flags=re.MULTILINE)[0].rstrip()


def served(claims: list[Claim]) -> str:
    """Return `whole` or `part`, of a system that several methods may serve together."""
    whole = all(not claim.missing for claim in claims)
    return "whole" if whole else "part"


def card(method: type[Any]) -> dict[str, Any]:
    """Return everything that a method says about itself, as JSON can hold it."""
    return {
        "family": method.family,
        "name": method.name,
        "aliases": list(method.aliases),
        "summary": summary(method),
        "exactness": method.exactness.value,
        "needs": sorted(need.value for need in method.needs),
        "source": {k: v for k, v in dataclasses.asdict(method.source).items() if v},
        "settings": [_plain(dataclasses.asdict(each)) for each in settings(method)],
        "examples": list(method.examples),
        "hidden": method.hidden,
        "catalogue": [
            {
                "number": number,
                "served": "part" if number in method.missing else "whole",
                "missing": method.missing.get(number),
                "shared": SHARED.get(number),
            }
            for number in method.catalogue
        ],
    }


def unavailable(registry: Registry) -> list[dict[str, Any]]:
    """Return a row for each module of a family that a missing package kept from being imported."""
    return [
        {"family": registry.family, "name": name, "needs": [package], "available": False}
        for name, package in registry.unavailable.items()
    ]


def cards() -> list[dict[str, Any]]:
    """Return the cards of every method, family by family, and what could not be imported."""
    rows = []
    for registry in FAMILIES.values():
        methods = registry.methods().values()
        rows += [card(method) | {"available": available(method)} for method in methods]
        rows += unavailable(registry)
    return rows


def available(method: type[Any]) -> bool:
    """Return whether the packages that a method needs are installed."""
    from importlib.util import find_spec

    return Ability.TORCH not in method.needs or find_spec("torch") is not None


def numbers() -> dict[int, str]:
    """Return `whole` or `part` for each number of the catalogue that is served."""
    return {number: served(claims) for number, claims in coverage().items()}


def _plain(setting: dict[str, Any]) -> dict[str, Any]:
    default = setting["default"]
    if not isinstance(default, bool | int | float | str | None):
        setting["default"] = str(default)
    return setting
