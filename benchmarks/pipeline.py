"""Layers over several nodes behind a slow network: plain decoding beside trees, and lost nodes.

    python benchmarks/pipeline.py MODEL --prompts FILE --nodes 2 3 --hop 0.02

Nodes are processes of this machine, or actors of a Ray cluster that is started here (`--ray`), one
Ray node each; every message takes `--hop` seconds more than it would. For each number of nodes the
same prompts are decoded plainly (a budget of 0) and with the default drafter and budget; every
output must be that of one engine without nodes. Then `--requests` prompts are decoded on the most
nodes while one of them, drawn by the seed, is killed in the middle of a pass, `--kills` times
evenly over the run: all outputs must be there, and equal.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from paceline import LM
from paceline.core import Output
from paceline.engines.pipeline import PipelineEngine
from paceline.engines.pipeline.processes import ProcessNodes
from paceline.engines.pipeline.settings import Pipeline
from paceline.measuring.prompts import read_prompts

ARMS: dict[str, int | str] = {"plain": 0, "default": "auto"}
KillNode = Callable[[PipelineEngine, int], None]


def kill_process(engine: PipelineEngine, index: int) -> None:
    """Kill the process of a node."""
    assert isinstance(engine._nodes, ProcessNodes)
    engine._nodes.processes[index].send_signal(signal.SIGKILL)


def kill_actor(engine: PipelineEngine, index: int) -> None:
    """Kill the process of a node's actor."""
    nodes: Any = engine._nodes
    os.kill(nodes.process(index), signal.SIGKILL)


@contextmanager
def launcher(on_ray: bool, most: int) -> Iterator[tuple[Any, KillNode]]:
    """Give what starts nodes and what kills them; with Ray, a cluster of `most` nodes here."""
    if not on_ray:
        yield None, kill_process
        return
    from ray.cluster_utils import Cluster

    from paceline.serving.cluster.pipeline_nodes import RayNodes
    from paceline.serving.cluster.ray_cluster import cluster

    small = {"num_cpus": 1, "object_store_memory": 80_000_000}
    nodes = Cluster(initialize_head=True, head_node_args=small | {"include_dashboard": False})
    try:
        for _ in range(most - 1):
            nodes.add_node(**small)
        with cluster(nodes.address):
            yield RayNodes, kill_actor
    finally:
        nodes.shutdown()


def generate(lm: LM, texts: list[str], tokens: int) -> list[Output]:
    """Decode texts one after the other, greedily."""
    return [lm.generate(each, max_new_tokens=tokens, temperature=0) for each in texts]


def measure(lm: LM, texts: list[str], tokens: int, expected: list[Output]) -> dict[str, Any]:
    """Return the speed of one arm, prompts included, and whether its outputs are the expected."""
    start = perf_counter()
    outputs = generate(lm, texts, tokens)
    total = perf_counter() - start
    made = sum(len(each.tokens) for each in outputs)
    passes = sum(each.passes for each in outputs)
    return {
        "tokens_per_second": made / total,
        "decoding": made / sum(each.seconds.decode for each in outputs),
        "tokens_per_pass": made / passes,
        "nodes_per_pass": sum(each.nodes for each in outputs) / passes,
        "equal": [each.tokens for each in outputs] == [each.tokens for each in expected],
    }


def kill_nodes(
    lm: LM, texts: list[str], tokens: int, kills: int, seed: int, kill: KillNode
) -> list[Output]:
    """Decode texts while nodes are killed in the middle of passes, evenly over the run."""
    engine = lm.engine
    assert isinstance(engine, PipelineEngine)
    random = np.random.default_rng(seed)
    at = set(np.linspace(0, len(texts) - 1, kills).round().astype(int).tolist())
    outputs = []
    for number, text in enumerate(texts):
        if number in at:
            stage = int(random.integers(len(engine._stages)))
            run, left = engine._stages[stage].run, int(random.integers(1, 6))

            def killing(*given: Any, **more: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    kill(engine, stage)  # noqa: B023 (used before the next one)
                return run(*given, **more)  # noqa: B023

            setattr(engine._stages[stage], "run", killing)  # noqa: B010
        outputs += generate(lm, [text], tokens)
    return outputs


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--hop", type=float, default=0.02, help="seconds added to each message")
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--request-tokens", type=int, default=24)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", default="auto", help="of the weights, as for `paceline`")
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    every = [each.turns[0] for each in read_prompts(asked.prompts)]
    texts = [every[i * len(every) // asked.count] for i in range(asked.count)]
    several = [every[i % len(every)] for i in range(asked.requests)]
    with LM(asked.model, dtype=asked.format, budget=0) as lm:
        expected = generate(lm, texts, asked.tokens)
        wanted = generate(lm, several, asked.request_tokens)
    found: dict[str, Any] = {}
    with launcher(asked.ray, max(asked.nodes)) as (launch, kill):
        for nodes in asked.nodes:
            pipeline = Pipeline(nodes, launch, hop_seconds=asked.hop)
            for arm, budget in ARMS.items():
                with LM(asked.model, dtype=asked.format, budget=budget, pipeline=pipeline) as lm:
                    arm_found = measure(lm, texts, asked.tokens, expected)
                found[f"{nodes} nodes, {arm}"] = arm_found
                shown = ", ".join(f"{k} {v:.2f}" for k, v in arm_found.items())
                print(f"{nodes} nodes, {arm}: {shown}", flush=True)
        pipeline = Pipeline(max(asked.nodes), launch)
        with LM(asked.model, dtype=asked.format, pipeline=pipeline) as lm:
            kept = kill_nodes(lm, several, asked.request_tokens, asked.kills, asked.seed, kill)
            replaced = getattr(lm.engine, "replaced", 0)
    equal = sum(a.tokens == b.tokens for a, b in zip(kept, wanted, strict=True))
    found["faults"] = {"killed": replaced, "requests": len(wanted), "equal": equal}
    print(f"{replaced} nodes killed in {len(wanted)} requests: {equal} outputs equal", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1))
    whole = all(each["equal"] for name, each in found.items() if name != "faults")
    if not whole or equal < len(wanted) or replaced < asked.kills:
        raise SystemExit("an output is not that of one engine, or no node was killed")


if __name__ == "__main__":
    main()
