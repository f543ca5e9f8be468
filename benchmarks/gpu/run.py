"""One run on a GPU: passes over trees, Spec-Bench with drafters, a compiled loop, and proofs.

    python benchmarks/gpu/run.py MODEL... [--questions ../shared/data/spec-bench/question.jsonl]

For each model: T(n), the time of a pass over n nodes, of the reference engine and of the static one
with CUDA graphs; tokens a second of plain decoding, of token_recycling, recycle and blend, and of a
compiled loop of plain decoding; and whether drafted texts are those of plain decoding. Writes
`gpu.json` and `gpu.md` after each part, so that a run that is cut off has what it measured; parts
for which `--minutes` leaves no time are named. `--device cpu --smoke` runs all parts in seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from compiled_loop import CompiledLoop

from paceline import LM
from paceline.decoding.governor import Fixed
from paceline.engines.cost import measure_cost
from paceline.engines.static import StaticEngine
from paceline.errors import PacelineError
from paceline.machine import machine, versions
from paceline.measuring.baseline import TurnOptions
from paceline.measuring.bench import Bench, bench
from paceline.measuring.proof import prove
from paceline.measuring.statistics import median_interval
from paceline.measuring.suites import read_tasks
from paceline.registry import drafters

ROOT = Path(__file__).parent.parent.parent
QUESTIONS = ROOT.parent / "shared" / "data" / "spec-bench" / "question.jsonl"
METHODS = ("token_recycling", "recycle", "blend")
NODES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80)


class Report:
    """What is known so far, as JSON and as Markdown."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self._folder = folder
        self.facts = facts
        folder.mkdir(parents=True, exist_ok=True)

    def write(self) -> None:
        """Write both files."""
        (self._folder / "gpu.json").write_text(json.dumps(self.facts, indent=1) + "\n")
        (self._folder / "gpu.md").write_text(self._markdown())

    def _markdown(self) -> str:
        facts = self.facts
        system = ", ".join(f"{key} {value}" for key, value in facts["machine"].items())
        lines = [f"# {facts['device']}", "", f"{facts['format']}; {system}"]
        for name, model in facts["models"].items():
            lines += ["", f"## {name}", ""]
            for part, note in model.get("skipped", {}).items():
                lines.append(f"- {part}: {note}")
            if curves := model.get("cost"):
                lines += [
                    "| nodes | " + " | ".join(curves) + " |",
                    "|---:|" + "---:|" * len(curves),
                ]
                for place, nodes in enumerate(NODES):
                    times = (curve[place] for curve in curves.values() if place < len(curve))
                    cells = " | ".join(f"{seconds * 1e3:.3f} ms" for seconds in times)
                    if cells:
                        lines.append(f"| {nodes} | {cells} |")
            if speeds := model.get("speed"):
                lines += ["", "| | tokens/s | x plain | tokens a pass | as plain |"]
                lines.append("|---|---:|---:|---:|---:|")
                for arm, row in speeds.items():
                    lines.append(
                        f"| {arm} | {row['tokens_per_second']:.1f} | {row['ratio'][0]:.2f} "
                        f"({row['ratio'][1]:.2f} to {row['ratio'][2]:.2f}) "
                        f"| {row['tokens_per_pass']:.2f} | {row['same']} |"
                    )
            for arm, tally in model.get("proof", {}).items():
                lines.append(f"\nproof, {arm}: {tally}")
        return "\n".join(lines) + "\n"


def costs(lm: LM, options: argparse.Namespace) -> dict[str, list[float]]:
    """Return T(n) in seconds of each engine, at the largest size too."""
    nodes, repeats = (NODES[:4], 1) if options.smoke else (NODES, 9)
    plain = LM(options.path, engine="reference", device=options.device, dtype=options.format)
    return {
        engine.name: list(measure_cost(engine, sizes=nodes, repeats=repeats).seconds)
        for engine in (plain.engine, lm.engine)
    }


def speeds(lm: LM, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return what each drafter and the compiled loop reach on the prompts."""
    tasks = read_tasks(options.questions, options.prompts, "spec-bench")
    if options.smoke:
        tasks = tasks[:1]
    turns = TurnOptions(options.tokens, chat=options.chat, ignore_eos=True)
    methods = {name: drafters.parse(name) for name in METHODS}
    budgets = [8] if options.smoke else ["auto", 16]
    measured = bench(lm, methods, tasks, turns, budgets, repeat=1 if options.smoke else 2)
    found = {}
    for arm in measured.arms:
        runs = [run for runs in arm.runs.values() for run in runs]
        passes = sum(run.passes for run in runs)
        found[arm.name] = {
            "tokens_per_second": arm.total_tokens_per_second(measured.turns),
            "ratio": list(measured.ratio(arm, measured.turns, lambda run: run.decoding())),
            "tokens_per_pass": sum(run.tokens for run in runs) / passes if passes else 0.0,
            "same": f"{sum(run.identical for run in runs)} of {len(runs)}",
        }
    return found | loop(lm, measured, options)


def loop(lm: LM, measured: Bench, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return what plain decoding reaches with nothing but compiled passes."""
    assert isinstance(lm.engine, StaticEngine)
    compiled = not options.smoke and not options.no_compile
    decoder = CompiledLoop(lm.engine, compiled)
    plain = measured.arms[0]
    tokens, ratios, same, seconds = 0, [], 0, []
    for place, turn in enumerate([measured.turns[0], *measured.turns]):
        expected = turn.plain.tokens
        got, took = decoder.generate(np.array(turn.request.prompt, np.int32), len(expected))
        if not place:
            continue  # compiles
        tokens += len(got)
        seconds.append(took)
        same += tuple(got) == tuple(expected)
        ratios.append(plain.seconds(turn) / took)
    return {
        "compiled loop" if compiled else "loop of graphs": {
            "tokens_per_second": tokens / sum(seconds),
            "ratio": list(median_interval(ratios)),
            "tokens_per_pass": 1.0,
            "same": f"{same} of {len(ratios)}",
        }
    }


def proofs(lm: LM, options: argparse.Namespace) -> dict[str, str]:
    """Return for each drafter what a proof found, greedy and sampled."""
    tasks = read_tasks(options.questions, 1, "spec-bench")[: 1 if options.smoke else None]
    turns = TurnOptions(min(options.tokens, 64), chat=options.chat)
    methods = {name: drafters.parse(name) for name in METHODS}
    proof = prove(lm, methods, tasks, (0.0, 1.0), turns, lambda: Fixed(16))
    return {
        name: f"{tally.identical} of {tally.pairs} identical, {tally.ties} ties, {tally.bugs} bugs"
        for name, tally in proof.drafters.items()
    }


PARTS: dict[str, tuple[Callable[..., Any], float]] = {  # and the minutes that it takes at most
    "cost": (costs, 0.5),
    "speed": (speeds, 3.0),
    "proof": (proofs, 1.0),
}


def measure(path: Path, report: Report, options: argparse.Namespace, end: float) -> None:
    """Run all parts for one model, as far as the time goes."""
    facts: dict[str, Any] = {"skipped": {}}
    report.facts["models"][path.name] = facts
    options.path = path
    lm = LM(path, engine="static", device=options.device, dtype=options.format)
    options.chat = lm.tokenizer.template is not None and not options.smoke
    for name, (part, minutes) in PARTS.items():
        if perf_counter() + minutes * 60 > end and not options.smoke:
            facts["skipped"][name] = "no time was left; raise --minutes or give fewer models"
            continue
        start = perf_counter()
        facts[name] = part(lm, options)
        facts[f"{name}_seconds"] = perf_counter() - start
        report.write()
    report.write()


def main() -> None:
    """Parse the command line, measure every model, write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--format", default="bf16", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--questions", type=Path, default=QUESTIONS)
    parser.add_argument("--prompts", type=int, default=3, help="of each task")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--no-compile", action="store_true", help="the loop is a CUDA graph only")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--smoke", action="store_true", help="every part once, in seconds")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit(
            "torch finds no CUDA device here; run this on a machine with one, or try the parts "
            "with --device cpu --smoke"
        )
    if options.smoke:
        options.tokens, options.format = min(options.tokens, 12), "fp32"
    cuda = options.device.startswith("cuda")
    device = torch.cuda.get_device_name(options.device) if cuda else options.device
    facts = {"device": device, "machine": machine(), "versions": versions()}
    report = Report(options.out, {**facts, "format": options.format, "models": {}})
    end = perf_counter() + options.minutes * 60
    try:
        for path in options.models:
            measure(path, report, options, end)
    except PacelineError as error:
        sys.exit(str(error))
    print((options.out / "gpu.md").read_text())


if __name__ == "__main__":
    main()
