"""Results as JSON documents and as tables; `docs/reference/bench-json.md` has the fields."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE
from rich.console import RenderableType
from rich.table import Table

from paceline.decoding.governor import Governor
from paceline.engines.base import Engine
from paceline.lm import LM
from paceline.machine import machine, versions
from paceline.measuring.baseline import BaselineTurn
from paceline.measuring.bench import Arm, ArmRun, Bench
from paceline.measuring.proof import Difference, Finding, Proof

Document = dict[str, Any]
_PARTS = ("draft", "guide", "forward", "walk")  # parts of decoding


def conditions(lm: LM, model: str) -> Document:
    """Return what every report says about the machine, the model and the engine."""
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
    """Return name, formats, threads and rounding guarantees of an engine."""
    return {
        "name": engine.name,
        "format": engine.format,
        "kv_format": engine.kv_format,
        "threads": engine.threads,
        "invariant": engine.invariant,
        "tolerance": engine.tolerance,
    }


def proof_document(proof: Proof) -> Document:
    """Return the counts of all drafters and of each, and the differences."""
    return {
        "pairs": proof.total("pairs"),
        "identical": proof.total("identical"),
        "ties": proof.total("ties"),
        "bugs": proof.total("bugs"),
        "first": _finding(proof.first) if proof.first else None,
        "prompts": proof.prompts,
        "clipped": proof.clipped,
        "drafters": {name: asdict(tally) for name, tally in proof.drafters.items()},
        "differences": [_finding(finding) for finding in proof.findings],
    }


def _finding(finding: Finding) -> Document:
    row = {"drafter": finding.drafter, "prompt": finding.prompt, "temperature": finding.temperature}
    return {**row, **difference_document(finding.difference)}


def difference_document(difference: Difference) -> Document:
    """Return a difference; a margin that is not finite becomes null."""
    row = asdict(difference)
    if row["margin"] is not None and not math.isfinite(row["margin"]):
        row["margin"] = None
    return row


def proof_table(proof: Proof) -> RenderableType:
    """Return a table with one row per drafter."""
    table = Table("drafter", "pairs", "identical", "ties", "bugs", "tokens/pass", box=SIMPLE)
    for name, tally in proof.drafters.items():
        rate = f"{tally.tokens / tally.passes:.2f}" if tally.passes else "-"
        counts = (tally.pairs, tally.identical, tally.ties, tally.bugs)
        table.add_row(name, *map(str, counts), rate)
    align_numbers_right(table)
    return table


def bench_document(bench: Bench) -> Document:
    """Return every measured number of a bench."""
    return {
        "clipped": sum(turn.clipped for turn in bench.turns),
        "prompts": [
            {
                "name": turn.name,
                "category": turn.category,
                "tokens": len(turn.request.prompt),
                "clipped": turn.clipped,
            }
            for turn in bench.turns
        ],
        "arms": [_arm(bench, arm) for arm in bench.arms],
        "cost": {
            "context": bench.cost_context,
            "nodes": list(bench.cost.nodes),
            "seconds": list(bench.cost.seconds),
            "relative": [seconds / bench.cost.seconds[0] for seconds in bench.cost.seconds],
        },
        "bandwidth": {
            **bench.bandwidth._asdict(),
            "bytes_per_token": bench.bytes_per_token,
            "share": bench.share,
        },
        "memory": bench.memory._asdict(),
        "trace": {
            "prompt": bench.traced.name,
            "arms": {arm.name: list(map(asdict, arm.traced)) for arm in bench.arms},
        },
    }


def _arm(bench: Bench, arm: Arm) -> Document:
    return {
        "name": arm.name,
        "drafter": arm.spec,
        "budget": arm.budget,
        "state": arm.state,
        "walk": arm.walk,
        "state_bytes": arm.bytes,
        "governor": arm.sizes.report() if isinstance(arm.sizes, Governor) else None,
        **_speed(bench, arm, bench.turns),
        "categories": {
            name: _speed(bench, arm, [turn for turn in bench.turns if turn.category == name])
            for name in dict.fromkeys(turn.category for turn in bench.turns)
        },
        "reliability": arm.reliability.rows(arm.drafter.origins),
        "answers": [_answer(arm, turn) for turn in bench.turns],
    }


def _answer(arm: Arm, turn: BaselineTurn) -> Document:
    """Return one prompt by one arm; the counts are those of the last round."""
    runs = arm.runs[turn.name]
    same = all(run.identical for run in runs)
    return {
        "identical": same,
        "equal": "text" if same else "distribution" if arm.walk == "rejection" else "no",
        "tokens": runs[-1].tokens,
        "passes": runs[-1].passes,
        "nodes": runs[-1].nodes,
        "prefill": arm.seconds(turn, lambda run: run.seconds.prefill),
        "decode": arm.seconds(turn),
    }


def _speed(bench: Bench, arm: Arm, turns: list[BaselineTurn]) -> Document:
    """Return sums over the runs of these turns, and medians over the turns."""
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
        "seconds": {part: _total(runs, part) for part in ("prefill", "decode", *_PARTS)},
        "pass_seconds": {part: _total(runs, part) / passes for part in ("decode", *_PARTS)},
        "ratio": bench.ratio(arm, turns, ArmRun.decoding)._asdict(),
        "ratio_with_prefill": bench.ratio(arm, turns, ArmRun.whole)._asdict(),
        "total": {
            "tokens_per_second": arm.total_tokens_per_second(turns),
            "ratio": bench.total_ratio(arm, turns)._asdict(),
        },
    }


def _total(runs: list[ArmRun], part: str) -> float:
    total: float = sum(getattr(run.seconds, part) for run in runs)
    return total


def align_numbers_right(table: Table) -> Table:
    """Align every column but the first to the right."""
    for column in table.columns[1:]:
        column.justify = "right"
    return table
