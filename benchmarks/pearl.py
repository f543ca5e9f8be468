"""What drafting while the target verifies gains (`model:schedule=pearl`), as Markdown tables.

    python benchmarks/pearl.py TARGET DRAFT

TARGET and DRAFT have the same tokens; TARGET costs something: `paceline inflate` makes such a one.
Greedy decoding on the documents of stories-val, as in `drafters.py`, 64 new tokens each. All arms
decode a prompt in turn, in one process, and must write the same. The first table holds sums over
all prompts, and the median over prompts of the speed in relation to plain decoding.

The second table is the same on every machine: the target begins only when the thread has made all
passes that it may, as if it had a core of its own and the time. A proposal then waits for so many
draft passes, and `r` is the cost of one in passes of the target, from which `pearl` gains.
"""

from __future__ import annotations

import argparse
import threading
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

from drafters import prompts
from paceline import LM
from paceline.core import Output, Request
from paceline.decoding.governor import Fixed
from paceline.decoding.loop import Generation
from paceline.drafters.base import Drafter
from paceline.engines.follower import Follower
from paceline.engines.native import NativeEngine
from paceline.registry import drafters

NEW = 64
PEARL = "schedule=pearl"


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
        ("pearl, a core less", f"model:path={draft},{PEARL}", cores - 1),
        ("pearl, wait=2, a core less", f"model:path={draft},{PEARL},wait=2", cores - 1),
        ("pearl", f"model:path={draft},{PEARL}", cores),
    ):
        set_threads(lm, threads)
        found.append(Arm(name, threads, drafters.parse(spec).build(lm.draft_target)))
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


def speeds(lm: LM, every: list[Arm], requests: list[Request], budget: int) -> None:
    """Print the first table."""
    outputs: dict[str, list[Output]] = defaultdict(list)
    for request in requests:
        for arm in every:
            outputs[arm.name].append(decode(lm, arm, request, budget))
            if outputs[arm.name][-1].tokens != outputs["plain"][-1].tokens:
                raise SystemExit(f"{arm.name} differs from plain decoding")
    print("| schedule | tokens per pass | share of drafting | speed over plain |")
    print("| --- | --- | --- | --- |")
    for arm in every:
        found = outputs[arm.name][1:]  # the first prompt warms up
        tokens, passes = sum(len(o.tokens) for o in found), sum(o.passes for o in found)
        share = sum(o.seconds.draft for o in found) / sum(o.seconds.decode for o in found)
        pairs = zip(found, outputs["plain"][1:], strict=True)
        ratio = median(one.tokens_per_second / other.tokens_per_second for one, other in pairs)
        print(f"| {arm.name} | {tokens / passes:.2f} | {share:.0%} | {ratio:.2f}x |")


def waits(lm: LM, draft: str, requests: list[Request], budget: int) -> None:
    """Print the second table."""
    forward = lm.engine.forward

    def patient(*words: Any, **more: Any) -> Any:
        for thread in threading.enumerate():
            if thread.name == "paceline-pearl":
                thread.join()
        return forward(*words, **more)

    setattr(lm.engine, "forward", patient)  # noqa: B010 (a method is replaced on purpose)
    run, waited = Follower.run, 0

    def counting(*words: Any, **more: Any) -> Any:
        nonlocal waited
        waited += threading.current_thread() is threading.main_thread()
        return run(*words, **more)

    setattr(Follower, "run", counting)  # noqa: B010
    print("\n| schedule | tokens per pass | draft passes waited for | gains from r = |")
    print("| --- | --- | --- | --- |")
    serial: Callable[[float], float] | None = None
    for spec in ("", f",{PEARL}", f",{PEARL},wait=2", f",{PEARL},wait=8"):
        drafter, tokens, passes, waited = drafters.parse(f"model:path={draft}{spec}"), 0, 0, 0
        built = drafter.build(lm.draft_target)
        for request in requests:
            output = Generation(lm.engine, built, request, Fixed(budget)).run()
            tokens, passes = tokens + len(output.tokens), passes + output.passes
        rate, wait = tokens / passes, waited / passes

        def cost(r: float, rate: float = rate, wait: float = wait) -> float:
            return (1 + wait * r) / rate

        serial = serial or cost
        gains = next((r / 100 for r in range(101) if cost(r / 100) < serial(r / 100)), None)
        cells = f"{rate:.2f} | {wait:.2f} | {'' if gains is None else gains}"
        print(f"| {spec[1:] or 'serial'} | {cells} |")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target")
    parser.add_argument("draft")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--budget", type=int, default=8)
    parser.add_argument("--format", default="int8")
    parser.add_argument("--only-waits", action="store_true", help="Leave the first table out.")
    options = parser.parse_args()
    lm = LM(options.target, drafter="plain", dtype=options.format, threads=options.cores)
    requests = [
        lm.request(prompt, max_new_tokens=NEW, temperature=0.0, ignore_eos=True)
        for prompt in prompts(lm, slice(options.count))
    ]
    if not options.only_waits:
        speeds(lm, arms(lm, options.draft, options.cores), requests, options.budget)
    waits(lm, options.draft, requests, options.budget)


if __name__ == "__main__":
    main()
