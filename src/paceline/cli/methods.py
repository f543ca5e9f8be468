"""`paceline methods`: what is registered."""

from __future__ import annotations

from typing import Any

from paceline.cli import options
from paceline.cli.output import document, show


def methods(json: options.Json = False) -> None:
    """List the methods, with what each promises, needs and is based on."""
    rows = registered()
    if json:
        document({"methods": rows})
        return
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table("name", "family", "output", "settings", "needs", "source", box=SIMPLE)
    for row in rows:
        settings = ", ".join(f"{key}={value}" for key, value in row["settings"].items())
        name = row["name"] + (" (for tests)" if row["hidden"] else "")
        table.add_row(
            name, row["family"], row["exactness"], settings, ", ".join(row["needs"]), row["source"]
        )
    show(table)


def registered() -> list[dict[str, Any]]:
    """One row for each method of each family."""
    from dataclasses import MISSING, fields

    from paceline.registry import FAMILIES

    return [
        {
            "name": name,
            "family": registry.family,
            "exactness": method.exactness.value,
            "needs": sorted(method.needs),
            "source": str(method.source),
            "catalogue": list(method.catalogue),
            "settings": {
                f.name: None if f.default is MISSING else f.default for f in fields(method)
            },
            "summary": (method.__doc__ or "").partition("\n")[0],
            "hidden": method.hidden,
        }
        for registry in FAMILIES.values()
        for name, method in registry.methods().items()
    ]
