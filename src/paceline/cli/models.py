"""`paceline models`: which models can be named, and which are here."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from paceline.cli import options
from paceline.cli.output import document, say, show

if TYPE_CHECKING:
    from paceline.models.local_models import ListedModel


def models(json: options.Json = False) -> None:
    """List the models that have names and those that are here: size, licence, place."""
    from paceline.models.known_models import models_folder
    from paceline.models.local_models import list_models

    rows = list_models()
    if json:
        document({"folder": str(models_folder()), "models": [asdict(row) for row in rows]})
        return
    show(_table(rows))
    say(f"pulled models are kept in {models_folder()}")


def _table(rows: list[ListedModel]) -> Any:
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE)
    for column in ("name", "model", "size", "licence", "kind", "from", "here"):
        table.add_column(column, justify="right" if column == "size" else "left")
    for row in rows:
        kind = {True: "chat", False: "base", None: ""}[row.chat]
        here = "yes" if row.here else "no"
        size, sources = f"{row.size / 1e6:,.1f} MB", ", ".join(row.sources)
        cells = (row.name, row.title, size, row.licence, kind, sources, here)
        table.add_row(*map(Text, cells))
    return table
