"""What `--budget` of `paceline compress` asks for, and the search that fits it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.errors import RequestError

if TYPE_CHECKING:
    from paceline.compress.budget.search import BudgetSearch
    from paceline.compress.budget.shape_search import Speed
    from paceline.models import Model

_KINDS = "bytes=SIZE, tokens/s=NUMBER or tokens/s=TIMESx, e.g. bytes=60MB or tokens/s=1.5x"


def budget_search(
    model: Model,
    out: Path,
    recipe: str,
    head: str,
    again: bool,
    budget: str,
    allocate: str,
    threads: int | None,
) -> BudgetSearch:
    """Return the search that the options of `paceline compress` describe.

    Raises:
        RequestError: the budget is none.
        MethodError: the recipe has no levels, or an unknown method.
    """
    from paceline.compress.budget.around import split_around
    from paceline.compress.budget.level_recipes import level_recipes
    from paceline.compress.budget.module_levels import split_words
    from paceline.compress.budget.search import BudgetSearch
    from paceline.compress.budget.shape_search import ShapeSearch
    from paceline.registry import allocators

    size, speed = parse_budget(budget)
    words, rest = split_words(recipe)
    around, rest = split_around(rest, words.any)
    allocator = allocators.parse(allocate)
    if speed is None and not words.any:
        levels = level_recipes(rest, head)
        return BudgetSearch(
            *(model, out, levels[0], again),
            levels=levels,
            budget=size,
            allocator=allocator,
            around=around,
        )
    levels = level_recipes(rest, head, 1 if words.any else 2)
    return ShapeSearch(
        *(model, out, levels[0], again),
        levels=levels,
        budget=size,
        allocator=allocator,
        around=around,
        words=words,
        speed=speed,
        threads=threads,
    )


def parse_budget(text: str) -> tuple[int, Speed | None]:
    """Return the bytes of a budget, or its speed; bytes are 0 then.

    Raises:
        RequestError: it is neither.
    """
    from paceline.cli.plan import parse_size
    from paceline.compress.budget.shape_search import Speed

    kind, _, value = (part.strip() for part in text.partition("="))
    if kind == "bytes":
        return parse_size("--budget", value), None
    if kind != "tokens/s":
        raise RequestError(f"--budget is {text!a:.80}, expected {_KINDS}")
    relative = value.endswith("x")
    try:
        number = float(value.removesuffix("x"))
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and 0 < number <= 1e6):
        raise RequestError(f"--budget is {text!a:.80}, expected {_KINDS}")
    return 0, Speed(number, relative)
