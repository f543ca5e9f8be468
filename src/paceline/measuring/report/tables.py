"""A bench's document as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table

from paceline.measuring.report.document import Document, align_numbers_right

_COLUMNS = 6  # categories side by side; they fit into 120 characters


def bench_tables(document: Document) -> RenderableType:
    """Return the tables of `document.bench_document`, without single prompts and tokens."""
    parts: list[RenderableType] = [_arms(document), *_reasons(document), *_categories(document)]
    return Group(
        *parts, _passes(document), *_reliability(document), _cost(document), _memory(document)
    )


def _arms(document: Document) -> Table:
    heads = ("arm", "× plain", "95 %", "total ×", "+ prefill", "tok/s", "tok/pass", "nodes")
    table = Table(*heads, "differ", title="Speed against plain decoding", box=SIMPLE)
    for arm in document["arms"]:
        table.add_row(
            arm["name"],
            f"{arm['ratio']['median']:.2f}",
            _bounds(arm["ratio"]),
            f"{arm['total']['ratio']['value']:.2f}",
            f"{arm['ratio_with_prefill']['median']:.2f}",
            f"{arm['tokens_per_second']:.1f}",
            f"{arm['tokens_per_pass']:.2f}",
            f"{arm['nodes_per_pass']:.1f}",
            str(arm["different"]) if arm["walk"] == "gumbel" else "distr.",
        )
    return align_numbers_right(table)


def _reasons(document: Document) -> list[str]:
    """Which walk ran and what governors did, a line each."""
    lines = []
    rejecting = [arm["name"] for arm in document["arms"] if arm["walk"] == "rejection"]
    if rejecting:
        lines.append(
            f"{', '.join(rejecting)}: the rejection walk, equal in distribution, not in text"
        )
    for arm in document["arms"]:
        if governor := arm["governor"]:
            share = governor["plain_passes"] / max(governor["passes"], 1)
            lines.append(f"{arm['name']}: {share:.0%} of passes plain; {governor['reason']}")
    return lines


def _passes(document: Document) -> Table:
    table = Table("arm", title="Microseconds of a pass, and what drafters keep", box=SIMPLE)
    for head in ("draft", "guides", "pass", "walk", "all", "learnt KB"):
        table.add_column(head)
    for arm in document["arms"]:
        parts = ("draft", "guide", "forward", "walk", "decode")
        spent = [arm["pass_seconds"][part] for part in parts]
        cells = [f"{1e6 * seconds:.0f}" for seconds in spent]
        table.add_row(arm["name"], *cells, f"{arm['state_bytes'] / 1e3:.0f}")
    return align_numbers_right(table)


def _reliability(document: Document) -> list[Table]:
    heads = ("arm", "origin", "guessed", "visited", "predicted", "observed", "Brier", "error")
    table = Table(*heads, title="How far scores can be trusted", box=SIMPLE)
    for arm in document["arms"]:
        for row in arm["reliability"]:
            rates = [row[name] for name in ("predicted", "observed", "brier", "error")]
            cells = ["-" if rate is None else f"{rate:.3f}" for rate in rates]
            table.add_row(arm["name"], row["origin"], *_counts(row), *cells)
    return [align_numbers_right(table)] if table.row_count else []


def _counts(row: Document) -> tuple[str, str]:
    return f"{row['guessed']:,}", f"{row['tested']:,}"


def _categories(document: Document) -> Iterator[Table]:
    """Yield tables with an arm per row and a category per column, as many as fit on a screen."""
    plain, *arms = document["arms"]
    names = list(plain["categories"])
    for first in range(0, len(names), _COLUMNS):
        table = Table("arm", title="× plain, by category (95 %)", box=SIMPLE)
        shown = names[first : first + _COLUMNS]
        for name in shown:
            table.add_column(f"{name}\n{plain['categories'][name]['prompts']} prompts")
        for arm in arms:
            ratios = [arm["categories"][name]["ratio"] for name in shown]
            cells = [f"{ratio['median']:.2f}\n{_bounds(ratio)}" for ratio in ratios]
            table.add_row(arm["name"], *cells)
        yield align_numbers_right(table)


def _cost(document: Document) -> Table:
    cost = document["cost"]
    title = f"T(n): one pass over n nodes after {cost['context']} tokens"
    table = Table("n", title=title, box=SIMPLE)
    for n in cost["nodes"]:
        table.add_column(str(n))
    table.add_row("ms", *(f"{1000 * seconds:.3g}" for seconds in cost["seconds"]))
    table.add_row("T(n)/T(1)", *(f"{ratio:.2f}" for ratio in cost["relative"]))
    return align_numbers_right(table)


def _memory(document: Document) -> str:
    speed, held = document["bandwidth"], document["memory"]
    text = f"Memory: {speed['bytes_per_second'] / 1e9:.1f} GB/s with {speed['threads']} threads"
    if speed["share"] is not None:
        size = speed["bytes_per_token"] / 1e6
        text += f"; plain reads {size:.1f} MB a token and reaches {speed['share']:.0%} of it"
    text += f"\nHeld: {held['peak_bytes'] / 1e6:.0f} MB at most by the process"
    if held["weight_bytes"] is not None:
        text += f", {held['weight_bytes'] / 1e6:.1f} MB of weights"
    if held["cache_bytes"] is not None:
        size = held["cache_bytes"] / 1e6
        text += f", {size:.1f} MB of keys and values for {held['cache_positions']} tokens"
    return text


def _bounds(ratio: Document) -> str:
    return f"{ratio['low']:.2f}–{ratio['high']:.2f}"
