"""How the words of a verb are parsed: one model, by position or by name; and its help."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

from paceline.errors import RequestError

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


class VerbCommand(TyperCommand):
    """A verb of the program: one model may be named, and the help cuts nothing."""

    model_comes_first = False

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words of a verb.

        Raises:
            RequestError: two models are named.
        """
        kept, models = split_models(args)
        if len(set(models)) > 1:
            raise RequestError(f"--model is {' and '.join(map(repr, models))}; give one")
        if self.model_comes_first:
            args = [*models[:1], *kept]
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help with rich, long words folded and not cut."""
        from typer import rich_utils

        setattr(rich_utils, "Columns", _flowing)  # noqa: B010
        setattr(rich_utils, "Table", _folding_table())  # noqa: B010
        super().format_help(ctx, formatter)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the parts of the usage line."""
        pieces = super().collect_usage_pieces(ctx)
        return [piece.replace("[[MODEL] [PROMPT]]...", "[MODEL] [PROMPT]") for piece in pieces]


class ModelFirstCommand(VerbCommand):
    """A verb whose first argument is the model, which `--model` may name instead."""

    model_comes_first = True


def split_models(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words without `--model`, and the values of each `--model`."""
    kept: list[str] = []
    models: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--":
            kept += [word, *rest]
        elif word.startswith("--model="):
            models.append(word.removeprefix("--model="))
        elif word == "--model" and (value := next(rest, None)) is not None:
            models.append(value)
        else:
            kept.append(word)
    return kept, models


def _flowing(items: Sequence[Any]) -> Text:
    """Return the parts of an option's help as one text that is folded where it must be."""
    from rich.text import Text

    return Text(" ", overflow="fold").join(items)


@cache
def _folding_table() -> type[Table]:
    """Return rich's table with cells that are folded where rich would cut them."""
    from rich.table import Table

    class FoldingTable(Table):
        def add_row(self, *cells: Any, **options: Any) -> None:
            super().add_row(*cells, **options)
            for column in self.columns:
                column.overflow = "fold"

    return FoldingTable


def command_of(verb: str, models_first: Sequence[str]) -> type[TyperCommand]:
    """Return the class that parses a verb's words."""
    return ModelFirstCommand if verb in models_first else VerbCommand
