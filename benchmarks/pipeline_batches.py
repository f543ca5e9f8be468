"""Several requests over nodes behind a slow network: one pass after the other, and several at once.

    python benchmarks/pipeline_batches.py MODEL --prompts FILE --nodes 2 3 --users 4 8 --hop 0.02

Nodes are processes of this machine with `--threads` each; every message takes `--hop` seconds more
than it would. For each number of nodes, users and each budget, the same prompts are decoded at the
same time, once with one pass under way and once with several (`passes_in_flight` of `Pipeline`), in
turns; every output must be that of one engine without nodes. Then `--requests` prompts are decoded
at the same time on the most nodes, one of which is killed `--kills` times, evenly over the passes,
with others under way: all outputs must be there, and equal.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from paceline import LM
from paceline.core import Output
from paceline.engines.pipeline import PipelineEngine
from paceline.engines.pipeline.processes import ProcessNodes
from paceline.engines.pipeline.settings import Pipeline
from paceline.measuring.prompts import read_prompts

ARMS: dict[str, int | None] = {"one pass": 1, "several": None}
BUDGETS: dict[str, int | str] = {"plain": 0, "default": "auto"}


def generate(lm: LM, texts: list[str], tokens: int) -> list[Output]:
    """Decode texts at the same time, greedily."""
    return lm.generate(texts, max_new_tokens=tokens, temperature=0, ignore_eos=True)


def measure(
    lms: dict[str, LM], texts: list[str], tokens: int, rounds: int, expected: list[Output]
) -> dict[str, Any]:
    """Return tokens per second of each arm, prompts included, medians of rounds in turns."""
    speeds: dict[str, list[float]] = {arm: [] for arm in lms}
    nodes: dict[str, float] = {}
    tokens_per_pass = 0.0
    equal = True
    for number in range(rounds):
        for arm in list(lms) if number % 2 == 0 else list(reversed(lms)):
            start = perf_counter()
            outputs = generate(lms[arm], texts, tokens)
            seconds = perf_counter() - start
            made = sum(len(each.tokens) for each in outputs)
            speeds[arm].append(made / seconds)
            passes = sum(each.passes for each in outputs)
            tokens_per_pass = made / passes
            nodes[arm] = sum(each.nodes for each in outputs) / passes
            equal &= [each.tokens for each in outputs] == [each.tokens for each in expected]
    found: dict[str, Any] = {arm: median(each) for arm, each in speeds.items()}
    one, several = (found[arm] for arm in ARMS)
    return found | {
        "ratio": several / one,
        "tokens_per_pass": tokens_per_pass,
        "nodes": nodes["one pass"],
        "nodes_several": nodes["several"],
        "equal": equal,
    }


def kill_nodes(lm: LM, texts: list[str], tokens: int, kills: int) -> dict[str, Any]:
    """Decode texts at the same time while nodes in turn are killed; return what came of it."""
    engine = lm.engine
    assert isinstance(engine, PipelineEngine)
    assert isinstance(engine._nodes, ProcessNodes)
    generate(lm, texts[:2], 2)  # measures the cost of passes
    begin, passes, flying = engine.begin, 0, 0
    every = max(1, tokens // (kills + 1))  # with a budget of 0 there are as many passes or more

    def killing(*given: Any) -> Any:
        nonlocal passes, flying
        passes += 1
        if passes % every == 0 and passes // every <= kills:
            nodes = engine._nodes.processes  # type: ignore[attr-defined]
            nodes[passes // every % len(nodes)].kill()
            flying += len(engine._flights)
        return begin(*given)

    setattr(engine, "begin", killing)  # noqa: B010
    outputs = generate(lm, texts, tokens)
    return {"killed": engine.replaced, "passes_under_way": flying, "outputs": outputs}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--users", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--hop", type=float, default=0.02, help="seconds added to each message")
    parser.add_argument("--characters", type=int, help="at most, of each prompt")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--request-tokens", type=int, default=24)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1, help="of each node")
    parser.add_argument("--format", default="auto", help="of the weights, as for `paceline`")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    every = [each.turns[0] for each in read_prompts(asked.prompts)]
    most = max(asked.users)
    texts = [every[index * len(every) // most][: asked.characters] for index in range(most)]
    several = [every[index % len(every)][: asked.characters] for index in range(asked.requests)]
    options: dict[str, Any] = {"dtype": asked.format, "threads": asked.threads}
    with LM(asked.model, budget=0, **options) as lm:
        expected = generate(lm, texts, asked.tokens)
        wanted = generate(lm, several, asked.request_tokens)
    found: dict[str, Any] = {}
    for nodes in asked.nodes:
        for budget in asked.budgets:
            with ExitStack() as stack:
                lms = {
                    arm: stack.enter_context(
                        LM(
                            asked.model,
                            budget=BUDGETS[budget],
                            pipeline=Pipeline(
                                nodes, hop_seconds=asked.hop, passes_in_flight=passes
                            ),
                            **options,
                        )
                    )
                    for arm, passes in ARMS.items()
                }
                for users in asked.users:
                    name = f"{nodes} nodes, {users} users, {budget}"
                    found[name] = measure(
                        lms, texts[:users], asked.tokens, asked.rounds, expected[:users]
                    )
                    shown = ", ".join(f"{k} {v:.2f}" for k, v in found[name].items())
                    print(f"{name}: {shown}", flush=True)
    with LM(asked.model, budget=0, pipeline=Pipeline(max(asked.nodes)), **options) as lm:
        faults = kill_nodes(lm, several, asked.request_tokens, asked.kills)
    kept = faults.pop("outputs")
    alike = sum(a.tokens == b.tokens for a, b in zip(kept, wanted, strict=True))
    print(
        f"{faults['killed']} nodes killed with {faults['passes_under_way']} other passes under way "
        f"in {len(wanted)} requests: {alike} outputs equal",
        flush=True,
    )
    if asked.json:
        whole = found | {"faults": faults | {"requests": len(wanted), "equal": alike}}
        asked.json.write_text(json.dumps(whole, indent=1))
    if alike < len(wanted) or faults["killed"] < asked.kills:
        raise SystemExit("an output is not that of one engine, or no node was killed")
    if not all(each["equal"] for each in found.values()):
        raise SystemExit("an output is not that of one engine")


if __name__ == "__main__":
    main()
