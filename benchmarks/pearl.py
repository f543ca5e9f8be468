"""What drafting while the target verifies gains (`model:schedule=pearl`), as a Markdown table.

    python benchmarks/pearl.py TARGET DRAFT

TARGET and DRAFT have the same tokens; TARGET costs something: `paceline inflate` makes such a one.
Greedy decoding on the documents of stories-val, as in `drafters.py`, 64 new tokens each. All arms
decode a prompt in turn, in one process, and must write the same; cells are sums over all prompts,
but for the speed, which is the median over prompts of the ratio to plain decoding.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from statistics import median
from typing import NamedTuple

from drafters import prompts
from paceline import LM
from paceline.core import Output, Request
from paceline.decoding.governor import Fixed
from paceline.decoding.loop import Generation
from paceline.drafters.base import Drafter
from paceline.engines.native import NativeEngine
from paceline.registry import drafters

NEW = 64


class Arm(NamedTuple):
    """A drafter, and the threads of the target that it drafts for."""

    name: str
    threads: int
    drafter: Drafter


def arms(lm: LM, draft: str, cores: int) -> list[Arm]:
    """Plain, and both schedules, with all cores for the target and with all but one."""
    found = []
    for name, spec, threads in (
        ("plain", "plain", cores),
        ("serial", f"model:path={draft}", cores),
        ("serial, a core less", f"model:path={draft}", cores - 1),
        ("pearl, a core less", f"model:path={draft},schedule=pearl", cores - 1),
        ("pearl, all cores", f"model:path={draft},schedule=pearl", cores),
    ):
        set_threads(lm, threads)
        found.append(Arm(name, threads, drafters.parse(spec).build(lm.target)))
    return found


def set_threads(lm: LM, threads: int) -> None:
    """Of the target."""
    if not isinstance(lm.engine, NativeEngine):
        raise SystemExit("this benchmark is for the native engine")
    lm.engine.threads = threads


def decode(lm: LM, arm: Arm, request: Request, budget: int) -> Output:
    """One output of one arm."""
    set_threads(lm, arm.threads)
    return Generation(lm.engine, arm.drafter, request, Fixed(budget)).run()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target")
    parser.add_argument("draft")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--budget", type=int, default=8)
    parser.add_argument("--format", default="int8")
    options = parser.parse_args()
    lm = LM(options.target, drafter="plain", format=options.format)
    outputs: dict[str, list[Output]] = defaultdict(list)
    every = arms(lm, options.draft, options.cores)
    for prompt in prompts(lm, slice(options.count + 1)):
        request = lm.request(prompt, max_new_tokens=NEW, temperature=0.0, ignore_eos=True)
        for arm in every:
            outputs[arm.name].append(decode(lm, arm, request, options.budget))
            if outputs[arm.name][-1].tokens != outputs["plain"][-1].tokens:
                raise SystemExit(f"{arm.name} differs from plain decoding")
    print("| arm | tokens per pass | draft share | speed over plain | over serial |")
    print("| --- | --- | --- | --- | --- |")
    for arm in every:
        found = outputs[arm.name][1:]  # the first prompt warms up
        tokens, passes = sum(len(o.tokens) for o in found), sum(o.passes for o in found)
        share = sum(o.seconds.draft for o in found) / sum(o.seconds.decode for o in found)
        ratios = [
            median(
                one.tokens_per_second / other.tokens_per_second
                for one, other in zip(found, outputs[base][1:], strict=True)
            )
            for base in ("plain", "serial")
        ]
        cells = [f"{tokens / passes:.2f}", f"{share:.0%}", *(f"{ratio:.2f}x" for ratio in ratios)]
        print(f"| {arm.name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
