"""Change one token of the pure core at a time and run its tests: do they notice?

    python scripts/mutants.py --count 10 --seed 0

Mutants come from cosmic-ray, are sampled with a seed from each module in `TESTS`, and run in a copy
of the checkout under `build/mutants`. Changes to annotations are left out: nothing evaluates them.
Prints the survivors as diffs; `docs/contributing/mutants.md` lists those that change no behaviour.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from cosmic_ray.commands.execute import execute
from cosmic_ray.commands.init import init
from cosmic_ray.config import ConfigDict
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkItem, WorkResult

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "mutants"
TIMEOUT = 240.0  # seconds; a mutant that hangs counts as caught

TESTS = {
    "decoding/text_stream": "decoding/test_text_stream.py",
    "decoding/session": "decoding/test_session.py decoding/test_loop.py decoding/test_walk.py "
    "decoding/test_rejection.py decoding/strategies/test_best_of.py control/guides/test_loop.py "
    "serving/test_worker.py",
    "decoding/governor": "decoding/test_governor.py serving/test_drafter_pool.py",
    "control/structured/matcher": "control/test_matcher.py control/test_grammar.py",
    "control/structured/tools": "control/test_tools.py",
    "models/formats/safetensors": "models/test_safetensors.py",
    "models/detokenize": "models/test_detokenize.py",
    "serving/scheduler": "serving/test_scheduler.py",
    "serving/prefix_cache": "serving/test_prefix_cache.py",
    "serving/rate_limits": "serving/test_rate_limits.py",
    "serving/api/middleware": "serving/api/test_middleware.py serving/api/test_operation.py "
    "serving/api/test_hostile.py",
}


def copy_checkout() -> Path:
    """Copy the tracked files, the native module and a link to `shared`; return the copy."""
    copy = WORK / "checkout"
    shutil.rmtree(WORK, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "src", "tests", "pyproject.toml"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    native = [str(path.relative_to(ROOT)) for path in ROOT.glob("src/paceline/_native*.so")]
    for name in [*listed.stdout.split(), *native]:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    if (ROOT.parent / "shared").exists():
        (WORK / "shared").symlink_to((ROOT.parent / "shared").resolve())
    return copy


def annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return begin and end (line, column) of every annotation."""
    spans = []
    for node in ast.walk(ast.parse(source)):
        for name in ("annotation", "returns"):
            found = getattr(node, name, None)
            if found is not None:
                begin = (found.lineno, found.col_offset)
                spans.append((begin, (found.end_lineno, found.end_col_offset)))
    return spans


def candidates(database: WorkDB, path: Path) -> list[list[WorkItem]]:
    """Return the mutants of one module by the token that they change, annotations left out."""
    init([path], database, {})
    spans = annotations(path.read_text())
    tokens: dict[tuple[int, int], list[WorkItem]] = {}
    for item in database.work_items:
        place = tuple(item.mutations[0].start_pos)
        if not any(begin <= place < end for begin, end in spans):
            tokens.setdefault(place, []).append(item)
    for items in tokens.values():
        items.sort(key=lambda item: item.mutations[0].operator_name)
    return [tokens[place] for place in sorted(tokens)]


def run(copy: Path, module: str, chosen: list[WorkItem]) -> list[WorkResult]:
    """Run the tests of `module` once for each chosen mutant."""
    tests = " ".join(f"tests/{name}" for name in TESTS[module].split())
    pytest = "pytest -x -q -p no:cacheprovider --hypothesis-profile repeatable"
    command = f"{sys.executable} -m {pytest} {tests}"
    plain = subprocess.run(command.split(), cwd=copy, capture_output=True, text=True, check=False)
    if plain.returncode:
        raise SystemExit(f"the tests of {module} fail without a mutant:\n{plain.stdout[-3000:]}")
    config = ConfigDict(
        {"timeout": TIMEOUT, "test-command": command, "distributor": {"name": "local", "local": {}}}
    )
    with use_db(str(WORK / f"{module.replace('/', '.')}.sqlite"), WorkDB.Mode.create) as database:
        database.clear()
        database.add_work_items(chosen)
        execute(database, config)
        return [result for _, result in database.results]


def main() -> None:
    """Sample, run and report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="modules whose name has this in it")
    options = parser.parse_args()
    copy = copy_checkout()
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy / "src")
    generator, chosen, total = random.Random(options.seed), {}, 0
    for module in TESTS:
        with use_db(str(WORK / "all.sqlite"), WorkDB.Mode.create) as database:
            tokens = candidates(database, Path("src/paceline") / f"{module}.py")
        total += sum(map(len, tokens))
        # A token first, then one of its changes: an operator has ten, a number two.
        sample = generator.sample(tokens, min(options.count, len(tokens)))
        chosen[module] = [generator.choice(items) for items in sample]
    print(
        f"{total} mutants, {options.count} tokens of each module, seed {options.seed}", flush=True
    )
    outcomes: Counter[str] = Counter()
    for module, items in chosen.items():
        if options.only not in module:
            continue
        for result in run(copy, module, items):
            caught = result.test_outcome != TestOutcome.SURVIVED
            outcomes["caught" if caught else "survived"] += 1
            if not caught:
                print(f"\n--- survived in {module}\n{result.diff}", flush=True)
        print(f"{module}: {len(items)} mutants; so far {dict(outcomes)}", flush=True)
    tried = sum(outcomes.values())
    print(f"{outcomes['caught']} of {tried} caught ({outcomes['caught'] / max(tried, 1):.0%})")


if __name__ == "__main__":
    main()
