"""Results as JSON documents and as tables. `docs/bench-json.md` says what the fields mean."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table

from paceline.decoding.governor import Governor
from paceline.engines.base import Engine
from paceline.lm import LM
from paceline.measuring.bench import Arm, Bench, Run
from paceline.measuring.machine import machine, versions
from paceline.measuring.proof import Difference, Finding, Proof
from paceline.measuring.turns import Turn

Document = dict[str, Any]


def conditions(lm: LM, model: str) -> Document:
    """What every report says about where its numbers come from."""
    config = lm.engine.config
    return {
        "versions": versions(),
        "machine": machine(),
        "model": {
            "path": model,
            "family": config.family,
            "vocab_size": config.vocab_size,
            "context": config.context,
        },
        "engine": engine_facts(lm.engine),
    }


def engine_facts(engine: Engine) -> Document:
    """Name, format, threads, and what it promises about rounding."""
    return {
        "name": engine.name,
        "format": engine.format,
        "kv_format": engine.kv_format,
        "threads": getattr(engine, "threads", None),
        "invariant": engine.invariant,
        "tolerance": engine.tolerance,
    }


def proof_document(proof: Proof) -> Document:
    """Counts over all drafters and for each, and the first difference."""
    return {
        "pairs": proof.total("pairs"),
        "identical": proof.total("identical"),
        "ties": proof.total("ties"),
        "bugs": proof.total("bugs"),
        "first": _finding(proof.first) if proof.first else None,
        "prompts": proof.prompts,
        "clipped": proof.clipped,
        "drafters": {name: asdict(tally) for name, tally in proof.drafters.items()},
        "differences": [_finding(found) for found in proof.findings],
    }


def _finding(found: Finding) -> Document:
    row = {"drafter": found.drafter, "prompt": found.prompt, "temperature": found.temperature}
    return {**row, **difference_document(found.difference)}


def difference_document(difference: Difference) -> Document:
    """A difference; a margin that is not finite is null."""
    row = asdict(difference)
    if row["margin"] is not None and not math.isfinite(row["margin"]):
        row["margin"] = None
    return row


def proof_table(proof: Proof) -> RenderableType:
    """One row for each drafter."""
    table = Table("drafter", "pairs", "identical", "ties", "bugs", "tokens/pass", box=SIMPLE)
    for name, tally in proof.drafters.items():
        rate = f"{tally.tokens / tally.passes:.2f}" if tally.passes else "-"
        counts = (tally.pairs, tally.identical, tally.ties, tally.bugs)
        table.add_row(name, *map(str, counts), rate)
    _to_the_right(table)
    return table


def bench_document(bench: Bench) -> Document:
    """Every measured number."""
    return {
        "clipped": sum(turn.clipped for turn in bench.turns),
        "arms": [_arm(bench, arm) for arm in bench.arms],
        "cost": {
            "context": bench.cost_context,
            "nodes": list(bench.cost.nodes),
            "seconds": list(bench.cost.seconds),
            "relative": list(bench.cost.relative().values()),
        },
        "bandwidth": {
            **bench.bandwidth._asdict(),
            "bytes_per_token": bench.bytes_per_token,
            "share": bench.share,
        },
    }


def _arm(bench: Bench, arm: Arm) -> Document:
    return {
        "name": arm.name,
        "drafter": arm.spec,
        "budget": arm.budget,
        "governor": arm.sizes.report() if isinstance(arm.sizes, Governor) else None,
        **_speed(bench, arm, bench.turns),
        "categories": {
            name: _speed(bench, arm, [turn for turn in bench.turns if turn.category == name])
            for name in dict.fromkeys(turn.category for turn in bench.turns)
        },
    }


def _speed(bench: Bench, arm: Arm, turns: list[Turn]) -> Document:
    """Sums over the runs of these turns, and medians over the turns."""
    runs = [run for turn in turns for run in arm.runs[turn.name]]
    passes = sum(run.passes for run in runs)
    tokens = sum(run.tokens for run in runs)
    return {
        "prompts": len(turns),
        "runs": len(runs),
        "identical": sum(run.identical for run in runs),
        "different": sum(not run.identical for run in runs),
        "tokens": tokens,
        "passes": passes,
        "tokens_per_pass": tokens / passes,
        "nodes_per_pass": sum(run.nodes for run in runs) / passes,
        "tokens_per_second": arm.tokens_per_second(turns),
        "seconds": {
            "prefill": sum(run.seconds.prefill for run in runs),
            "decode": sum(run.seconds.decode for run in runs),
            "draft": sum(run.seconds.draft for run in runs),
        },
        "ratio": bench.ratio(arm, turns, Run.decoding)._asdict(),
        "ratio_with_prefill": bench.ratio(arm, turns, Run.whole)._asdict(),
    }


def bench_tables(found: Document) -> RenderableType:
    """What `bench_document` holds: arms, categories, T(n) and bandwidth."""
    tables = (_arms_table, _category_table, _cost_table, _memory)
    return Group(*(table(found) for table in tables))


def _arms_table(found: Document) -> Table:
    heads = ("arm", "× plain", "95 %", "+ prefill", "tok/s", "tok/pass", "nodes", "draft", "differ")
    table = Table(*heads, title="Speed against plain decoding", box=SIMPLE)
    for arm in found["arms"]:
        table.add_row(
            arm["name"],
            f"{arm['ratio']['median']:.2f}",
            _bounds(arm["ratio"]),
            f"{arm['ratio_with_prefill']['median']:.2f}",
            f"{arm['tokens_per_second']:.1f}",
            f"{arm['tokens_per_pass']:.2f}",
            f"{arm['nodes_per_pass']:.1f}",
            f"{arm['seconds']['draft'] / arm['seconds']['decode']:.0%}",
            str(arm["different"]),
        )
    return _to_the_right(table)


def _category_table(found: Document) -> Table:
    plain, *arms = found["arms"]
    table = Table("category", "prompts", title="× plain, by category", box=SIMPLE)
    for arm in arms:
        table.add_column(arm["name"])
    for name, row in plain["categories"].items():
        ratios = [arm["categories"][name]["ratio"] for arm in arms]
        cells = [f"{ratio['median']:.2f} ({_bounds(ratio)})" for ratio in ratios]
        table.add_row(name, str(row["prompts"]), *cells)
    return _to_the_right(table)


def _cost_table(found: Document) -> Table:
    cost = found["cost"]
    title = f"T(n): one pass over n nodes after {cost['context']} tokens"
    table = Table("n", title=title, box=SIMPLE)
    for n in cost["nodes"]:
        table.add_column(str(n))
    table.add_row("ms", *(f"{1000 * seconds:.3g}" for seconds in cost["seconds"]))
    table.add_row("T(n)/T(1)", *(f"{ratio:.2f}" for ratio in cost["relative"]))
    return _to_the_right(table)


def _memory(found: Document) -> str:
    memory = found["bandwidth"]
    speed = memory["bytes_per_second"] / 1e9
    said = f"Memory: {speed:.1f} GB/s with {memory['threads']} threads"
    if memory["share"] is None:
        return said
    size = memory["bytes_per_token"] / 1e6
    return f"{said}; plain reads {size:.1f} MB a token and reaches {memory['share']:.0%} of it"


def _bounds(ratio: Document) -> str:
    return f"{ratio['low']:.2f} to {ratio['high']:.2f}"


def _to_the_right(table: Table) -> Table:
    for column in table.columns[1:]:
        column.justify = "right"
    return table
