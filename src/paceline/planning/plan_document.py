"""The JSON document of a plan's result, and the table that is shown for it."""

from __future__ import annotations

from dataclasses import asdict
from statistics import median
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from paceline.planning.planner import PlanResult

_SHOWN = 200  # candidates in the document


def plan_document(result: PlanResult) -> dict[str, Any]:
    """Return everything that is known of a plan, for JSON."""
    document = result.plan.document()
    for row, own in zip(document["setups"], result.plan.rows, strict=True):
        row["command"] = own.setup.command()
    document["errors"] = prediction_errors(result)
    document["candidates"] = [
        {
            **each.setup.document(),
            **asdict(each.forecast),
            "loss": None if each.loss is None else each.loss.value,
            "exact": each.exact,
            "fits": each.fits(result.plan.goal),
            "measured": not each.predicted,
        }
        for each in result.candidates[:_SHOWN]
    ]
    document["left_out"] = result.left_out
    document["repeated"], document["busy"] = result.repeated, result.busy
    return document


def prediction_errors(result: PlanResult) -> dict[str, Any] | None:
    """Return how far forecasts were from what was run; None if nothing was."""
    if not result.verified:
        return None
    errors = [abs(each.error) for each in result.verified]
    return {
        "median": median(errors),
        "largest": max(errors),
        "within_15_percent": sum(error <= 0.15 for error in errors) / len(errors),
    }


def plan_table(result: PlanResult) -> Table:
    """Return the setups as a table."""
    table = Table(box=SIMPLE)
    for name in (
        "setup",
        "tokens/s",
        "95 %",
        "predicted",
        "first token",
        "memory",
        "loss",
        "needs",
    ):
        table.add_column(name, justify="left" if name in ("setup", "needs") else "right")
    for number, row in enumerate(result.plan.rows):
        loss = "–" if row.loss is None else f"{row.loss:+.4f}"
        if row.loss is not None and row.loss_error is not None:
            loss += f" ± {row.loss_error:.4f}"
        table.add_row(
            f"{'→ ' if not number else '  '}{row.setup.title}",
            "–" if row.speed is None else f"{row.speed:.1f}",
            "–" if row.low is None else f"{row.low:.1f} to {row.high:.1f}",
            f"{row.predicted:.1f}",
            "–" if row.first_token is None else f"{row.first_token * 1e3:,.0f} ms",
            f"{row.memory / 1e6:,.1f} MB",
            "exact" if row.exact else loss,
            row.needs,
        )
    return table


def notes(result: PlanResult) -> list[str]:
    """Return what the user should know beside the table, a line each."""
    lines = []
    errors = prediction_errors(result)
    if errors is None:
        lines.append("nothing was run end to end: speeds are forecasts")
    else:
        lines.append(
            f"forecasts were off by {errors['median']:.0%} in the median, {errors['largest']:.0%} "
            "at most"
        )
    if result.busy:
        lines.append(
            f"the machine stayed busy during {result.busy} measurements; plan again when it is idle"
        )
    skipped = sum("no time" in reason for reason in result.left_out.values())
    if skipped:
        lines.append(
            f"{skipped} measurements did not fit into the minutes; the same command goes on where "
            "it was"
        )
    return lines
