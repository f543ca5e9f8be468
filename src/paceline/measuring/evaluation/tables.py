"""The results of an evaluation as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table

from paceline.measuring.report.document import align_numbers_right

_SHOWN_GROUPS = 8  # suites with more show none


def evaluation_tables(record: Mapping[str, Any]) -> RenderableType:
    """Return the tables of a document of `paceline eval`: metrics, and differences to the base."""
    tables = [_metrics(record)]
    if record["base"] is not None:
        tables.append(_differences(record))
    return Group(*tables)


def _metrics(record: Mapping[str, Any]) -> Table:
    columns = ["suite", "metric", "items", "value"]
    if record["base"] is not None:
        columns.append("base")
    table = Table(*columns, box=SIMPLE)
    for suite in record["suites"]:
        base = suite["base"] if record["base"] is not None else None
        _add_rows(table, _title(suite), suite, base)
        groups = suite.get("groups", {})
        if len(groups) <= _SHOWN_GROUPS:
            for name, group in groups.items():
                _add_rows(table, f"  {name}", group, base and base["groups"][name])
    return align_numbers_right(table)


def _add_rows(
    table: Table, title: str, part: Mapping[str, Any], base: Mapping[str, Any] | None
) -> None:
    for name, value in part["metrics"].items():
        row = [title, name, str(part["items"]), with_error(value)]
        if base is not None:
            row.append(with_error(base["metrics"].get(name)))
        table.add_row(*row)


def _differences(record: Mapping[str, Any]) -> Table:
    table = Table(
        "suite", "paired difference", "value", "p", "permutation p", "won / lost", box=SIMPLE
    )
    for suite in record["suites"]:
        comparison = suite["paired"]
        for name, value in comparison["metrics"].items():
            counts = f"{value['won']} / {value['lost']}" if "won" in value else ""
            estimate = {"value": value["difference"], "error": value["error"]}
            table.add_row(
                _title(suite),
                name,
                with_error(estimate, sign="+"),
                _probability(value["p"]),
                _probability(value.get("permutation_p")),
                counts,
            )
        if "equal_most_likely" in comparison:
            share = f"{comparison['equal_most_likely']:.1%}"
            table.add_row(_title(suite), "equal most likely tokens", share, "", "", "")
    return align_numbers_right(table)


def _title(suite: Mapping[str, Any]) -> str:
    prefix = suite["settings"].get("prefix")
    return f"{suite['suite']} ({prefix})" if prefix else str(suite["suite"])


def with_error(estimate: Mapping[str, Any] | None, sign: str = "") -> str:
    """Return a value with its standard error."""
    if estimate is None:
        return ""
    value, error = estimate["value"], estimate["error"]
    return f"{value:{sign}.4f}" if error is None else f"{value:{sign}.4f} ± {error:.4f}"


def _probability(p: float | None) -> str:
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
