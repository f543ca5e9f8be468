"""`paceline methods`: what is registered, by family, and what each method is."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.cli import options
from paceline.cli.output import document, show, write
from paceline.errors import MethodError, unknown

if TYPE_CHECKING:
    from paceline.features import Feature

Family = Annotated[str | None, typer.Argument(help="Show the methods of one family only.")]
Name = Annotated[str | None, typer.Argument(help="Show all about one method of the family.")]


def methods(family: Family = None, name: Name = None, json: options.Json = False) -> None:
    """List the methods by family; with FAMILY and NAME, explain one.

    FAMILY is singular or plural, e.g. drafter, drafters. `features` are what has no name to select.
    With --json also which systems of the catalogue are served, in whole or in part.
    """
    rows, features = _chosen(family, name)
    if json:
        document({"methods": rows, "features": features})
        return
    if name is not None:
        for row in rows:
            write(_explained(row))
        for feature in features:
            write(_explained_feature(feature))
        return
    show(_table(rows, features))


def _chosen(
    family: str | None, name: str | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows of the methods and of the features that were requested.

    Raises:
        MethodError: there is no such family or method.
    """
    from paceline.features import FEATURES
    from paceline.method_card import cards
    from paceline.registry import FAMILIES

    features = [_feature_row(feature) for feature in FEATURES]
    if family is None:
        return cards(), features
    wanted = _singular(family)
    if wanted not in (*FAMILIES, "feature"):
        raise MethodError(unknown("family", family, [*FAMILIES, "feature"]))
    if wanted == "feature":
        chosen = [row for row in features if name in (None, row["name"])]
        if not chosen:
            raise MethodError(unknown("feature", str(name), [row["name"] for row in features]))
        return [], chosen
    rows = [row for row in cards() if row["family"] == wanted]
    if name is None:
        return rows, []
    current = FAMILIES[wanted].current_name(name)
    if all(row["name"] != current for row in rows):
        FAMILIES[wanted].find(name)
    return [row for row in rows if row["name"] == current], []


def _singular(family: str) -> str:
    """Return the name of a family, given in singular or plural and with `-` or `_` for a space."""
    name = family.lower().replace("-", " ").replace("_", " ")
    for plural, singular in (("ies", "y"), ("s", "")):
        if name.endswith(plural):
            return name.removesuffix(plural) + singular
    return name


def _feature_row(feature: Feature) -> dict[str, Any]:
    """Return a feature as JSON can hold it."""
    row = asdict(feature)
    row["catalogue"] = [
        {
            "number": number,
            "served": "part" if number in feature.missing else "whole",
            "missing": feature.missing.get(number),
        }
        for number in feature.catalogue
    ]
    del row["missing"]
    return row


def _table(rows: list[dict[str, Any]], features: list[dict[str, Any]]) -> Any:
    """Return names and one line each, by family."""
    from rich.box import SIMPLE
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = []
    groups: dict[str, list[tuple[str, str, str]]] = {}
    for row in rows:
        if not row.get("hidden"):
            missing = "" if row["available"] else f" (needs {', '.join(row['needs'])})"
            line = (row["name"], row.get("exactness", ""), row.get("summary", "") + missing)
            groups.setdefault(row["family"], []).append(line)
    if features:
        groups["feature"] = [(row["name"], "", row["summary"]) for row in features]
    for family, lines in groups.items():
        table = Table(title=family, title_justify="left", show_header=False, box=SIMPLE)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, style="dim")
        for line in lines:
            table.add_row(*map(Text, line))
        parts.append(table)
    return Group(*parts)


def _explained(row: dict[str, Any]) -> str:
    """Return all about one method as text."""
    from paceline.method_card import description
    from paceline.registry import FAMILIES

    lines = [f"{row['family']} {row['name']}"]
    if "summary" not in row:
        return f"{lines[0]}\n\nneeds {', '.join(row['needs'])}\n"
    source = FAMILIES[row["family"]].find(row["name"]).source
    lines += ["", description(FAMILIES[row["family"]].find(row["name"])), ""]
    facts = {
        "output": row["exactness"],
        "needs": ", ".join(row["needs"]),
        "earlier names": ", ".join(row["aliases"]),
        "from": str(source),
        "examples": "  ".join(row["examples"]),
    }
    lines += [f"{key}: {value}" for key, value in facts.items() if value]
    lines += [_served(each) for each in row["catalogue"]]
    if row["settings"]:
        lines += ["", "settings:"]
    for each in row["settings"]:
        default = "required" if each["required"] else f"default {each['default']!r}"
        lines.append(f"  {each['name']} ({each['type']}, {default}): {each['doc']}")
    return "\n".join(lines) + "\n"


def _explained_feature(row: dict[str, Any]) -> str:
    """Return all about one feature as text."""
    lines = [f"feature {row['name']}", "", row["summary"], "", f"in: {row['module']}"]
    return "\n".join([*lines, *(_served(each) for each in row["catalogue"])]) + "\n"


def _served(each: dict[str, Any]) -> str:
    """Return how much of one system of the catalogue is served."""
    if each["served"] == "whole":
        return f"catalogue {each['number']}: served whole"
    return f"catalogue {each['number']}: served in part; missing: {each['missing']}"
