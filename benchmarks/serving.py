"""Our server under load: with speculation and without, while prompts arrive, and beside a peer.

    python benchmarks/serving.py MODEL [--part users stall prefix cold peers] [--rounds 5]
        [--peer llama.cpp] [--json FILE]

MODEL is a checkpoint, e.g. a real one inflated by `paceline inflate`; `--format int8` is how its
weights are kept, by the peer too (Q8_0). Parts:

- `users`: tokens/s at 1 and 8 closed-loop users, budget auto against 0, over prompts that return.
- `cold`: the same over prompts that never return, at the worker and through HTTP.
- `stall`: time between pieces of running streams, alone and while a long prompt arrives.
- `prefix`: time to first token of a second request over a shared prompt against the first.
- `peers`: time to first token, time per further token and tokens/s at 1, 4 and 16 users beside
  llama.cpp's own server (`servers.py`), same threads, a slot for each user; prompts never return.

Everything but the worker's rows goes through HTTP on loopback, as users would; each server is a
process of its own. What is compared takes turns, round by round, and the first round warms up;
cells are medians over the rest. All answers have `--tokens` tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import cold
import numpy as np
from busy import busy_others, ticks
from servers import Client, Prompt, build, check, gguf, llama_cpp, ours

from paceline.machine import machine, versions
from paceline.measuring.load.run import sender
from paceline.measuring.suites import read_tasks
from paceline.models import load
from paceline.models.trace import known_trace

WORDS = "Once upon a time there was a little dog who liked to play in the park with his friend"
USERS = (1, 4, 16)  # beside peers
SAME, FIRST = 8, 8  # prompts, and tokens, by which a peer's weights are known to be ours


def users_part(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Budget auto against 0; the same prompts in both, in turn."""
    texts: list[str] = [f"{WORDS[: 20 + 3 * n]} " for n in range(20)]
    if options.prompts:
        texts = [dialogue.turns[0] for dialogue in read_tasks(options.prompts)]
    found: dict[str, Any] = {}
    arms = {"auto": {}, "plain": {"speculation": {"budget": 0}}}
    with ours(options, folder) as client:
        for users in (1, 8):
            requests = options.requests * (1 if users == 1 else 3)
            rounds: list[dict[str, float]] = []
            for number in range(options.rounds + 1):
                first = number * requests
                asked = [texts[(first + each) % len(texts)] for each in range(requests)]
                order = list(arms) if number % 2 else list(arms)[::-1]
                loads = {arm: client.load(users, asked, **arms[arm]) for arm in order}
                if number:
                    rounds.append({arm: got["tokens_per_second"] for arm, got in loads.items()})
            ratios = [each["auto"] / each["plain"] for each in rounds]
            found[str(users)] = {
                "tokens_per_second": {arm: median(each[arm] for each in rounds) for arm in arms},
                "ratio": median(ratios),
                "least": min(ratios),
                "most": max(ratios),
            }
    return found


def stall_part(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Gaps between the pieces of streams that run, alone and while a long prompt arrives.

    `one_pass` is the median gap alone at the same number of streams, each plain, so that a gap is
    one pass.
    """
    with ours(options, folder) as client:
        return _stall(options, client)


def _stall(options: argparse.Namespace, client: Client) -> dict[str, Any]:
    streams, tokens = 4, max(options.tokens * 2, 96)
    plain = {"speculation": {"budget": 0}}
    alone: list[float] = []
    during: list[float] = []
    words = WORDS.split()

    async def one(prompt: str, arrives: bool) -> None:
        send = sender(client.server, lambda n: client.body(f"{n} {prompt}", tokens, **plain), 600.0)
        loop = asyncio.get_running_loop()
        runs = [asyncio.create_task(send(n, loop.time())) for n in range(streams)]
        start = end = 0.0
        if arrives:
            await asyncio.sleep(options.settle)
            # Words in another order each time: nothing of it is known from before.
            long = " ".join(random.sample(words * options.long, len(words) * options.long))
            late = sender(client.server, lambda n: client.body(long, 1, **plain), 600.0)
            start = loop.time()
            reply = await late(0, start)
            check([reply])
            end = reply.done
        replies = await asyncio.gather(*runs)
        check(replies)
        for reply in replies:
            for before, after in zip(reply.pieces, reply.pieces[1:], strict=False):
                if arrives and before < end and after > start:
                    during.append(after - before)
                if not arrives:
                    alone.append(after - before)

    for number in range(options.rounds):
        asyncio.run(one(f"story {number}", False))
        asyncio.run(one(f"tale {number}", True))
    one_pass = median(alone)
    return {
        "one_pass": one_pass,
        "alone_p99": float(np.quantile(alone, 0.99)),
        "during_p99": float(np.quantile(during, 0.99)) if during else None,
        "gaps_during": len(during),
        "p99_by_pass": float(np.quantile(during, 0.99)) / one_pass if during else None,
    }


def prefix_part(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Time to first token over one long beginning: new, and known."""
    with ours(options, folder) as client:
        return _prefix(options, client)


def _prefix(options: argparse.Namespace, client: Client) -> dict[str, Any]:
    draw, rounds = random.Random(0), []

    async def ask(prompt: str) -> float:
        send = sender(client.server, lambda n: client.body(prompt, 4), 600.0)
        reply = await send(0, asyncio.get_running_loop().time())
        check([reply])
        return reply.first

    for _ in range(options.rounds):
        shared = " ".join(draw.sample(WORDS.split() * 20, 380))[: options.shared_characters]
        rounds.append([asyncio.run(ask(f"{shared} {end}")) for end in ("The dog", "The cat")])
    return {
        "characters": len(shared),
        "first": median(first for first, _ in rounds),
        "second": median(second for _, second in rounds),
        "share": median(second / first for first, second in rounds),
    }


def peers_part(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Ours with drafts and without, and each peer, over the same prompts in turn."""
    model = load(options.model)
    prompts: list[Prompt] = [*cold.stories(model)]
    file = gguf(options, folder)
    found: dict[str, Any] = {}
    with ExitStack() as always:
        own = {
            "Paceline": always.enter_context(ours(options, folder)),
            "Paceline, budget 0": always.enter_context(ours(options, folder, "--budget", "0")),
        }
        for users in USERS:
            requests = max(options.requests, 2 * users)
            batches = [prompts[n * requests :][:requests] for n in range(options.rounds + 1)]
            del prompts[: requests * len(batches)]
            if len(batches[-1]) < requests:
                raise SystemExit("too few prompts; take fewer --rounds or --requests")
            with ExitStack() as stack:
                peers = {
                    peer: stack.enter_context(
                        llama_cpp(options, file, peer, users, model.config.context)
                    )
                    for peer in options.peer
                }
                found[str(users)] = side_by_side(own | peers, batches, users)
                if users == USERS[0]:
                    same = alike(own["Paceline, budget 0"], peers, prompts[-SAME:])
    return {"users": found, "alike": same}


def alike(own: Client, peers: dict[str, Client], prompts: list[Prompt]) -> dict[str, int]:
    """Of how many prompts a peer's answer begins as ours: it has the same weights, or has not.

    Raises:
        SystemExit: none does.
    """

    def texts(client: Client) -> list[str]:
        # Whether an answer's first space belongs to it, servers see differently.
        return [client.text(prompt, FIRST).strip() for prompt in prompts]

    known = texts(own)
    found = {
        name: sum(a == b for a, b in zip(known, texts(client), strict=True))
        for name, client in peers.items()
    }
    if other := [name for name, count in found.items() if not count]:
        raise SystemExit(f"{other[0]} never says what we say; its weights are other ones")
    return found


def side_by_side(
    clients: dict[str, Client], batches: list[list[Prompt]], users: int
) -> dict[str, Any]:
    """Each server over each batch in turn, every round in another order."""
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in clients}
    names = list(clients)
    for number, batch in enumerate(batches):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            got = clients[name].load(users, batch)
            if number:
                rounds[name].append(got)
    return {
        name: {
            "ttft_p50": median(each["ttft"]["p50"] for each in got),
            "ttft_p95": median(each["ttft"]["p95"] for each in got),
            "tpot_p50": median(each["tpot"]["p50"] for each in got),
            "tokens_per_second": median(each["tokens_per_second"] for each in got),
            "least": min(each["tokens_per_second"] for each in got),
            "most": max(each["tokens_per_second"] for each in got),
        }
        for name, got in rounds.items()
    }


def users_table(part: dict[str, Any]) -> list[str]:
    rows = [(users, row["tokens_per_second"], row) for users, row in part.items()]
    return [
        "| users | auto, tok/s | plain, tok/s | ratio | rounds |",
        "|---:|---:|---:|---:|---|",
        *(
            f"| {users} | {speeds['auto']:.1f} | {speeds['plain']:.1f} | {row['ratio']:.2f} "
            f"| {row['least']:.2f} to {row['most']:.2f} |"
            for users, speeds, row in rows
        ),
    ]


def stall_table(part: dict[str, Any]) -> list[str]:
    if part["during_p99"] is None:
        return ["No stream ran while the long prompt came; take more --tokens."]
    return [
        f"Between tokens: one pass {part['one_pass'] * 1e3:.1f} ms; 99th percentile "
        f"{part['alone_p99'] * 1e3:.1f} ms alone, {part['during_p99'] * 1e3:.1f} ms while a "
        f"long prompt comes: {part['p99_by_pass']:.2f} of a pass, {part['gaps_during']} gaps.",
    ]


def prefix_table(part: dict[str, Any]) -> list[str]:
    return [
        f"First token over a shared prompt: {part['first'] * 1e3:.0f} ms, then "
        f"{part['second'] * 1e3:.0f} ms: {part['share']:.0%}.",
    ]


def peers_table(part: dict[str, Any]) -> list[str]:
    lines = [
        "| users | server | first token, ms | 95 % | each further, ms | tok/s | rounds |",
        "|---:|---|---:|---:|---:|---:|---|",
    ]
    for users, row in part["users"].items():
        lines += [
            f"| {users} | {name} | {each['ttft_p50'] * 1e3:.0f} | {each['ttft_p95'] * 1e3:.0f} "
            f"| {each['tpot_p50'] * 1e3:.1f} | {each['tokens_per_second']:.1f} "
            f"| {each['least']:.0f} to {each['most']:.0f} |"
            for name, each in row.items()
        ]
    same = ", ".join(f"{name} {count}" for name, count in part["alike"].items())
    return [*lines, "", f"Answers that begin as ours, of {SAME}: {same}."]


PARTS: dict[str, tuple[Callable[..., Any], Callable[[Any], list[str]]]] = {
    "users": (users_part, users_table),
    "cold": (cold.cold_part, cold.table),
    "stall": (stall_part, stall_table),
    "prefix": (prefix_part, prefix_table),
    "peers": (peers_part, peers_table),
}


def markdown(report: dict[str, Any]) -> str:
    """Tables of what was measured, and the conditions."""
    lines = [
        line
        for part, (_, table) in PARTS.items()
        if part in report
        for line in (*table(report[part]), "")
    ]
    builds = "".join(f" {name}: {what}." for name, what in report["peers_are"].items())
    return "\n".join(
        [
            *lines,
            f"{report['model']}, {report['format']}, {report['threads']} threads, answers of "
            f"{report['tokens']} tokens, {report['rounds']} rounds, drafters "
            f"{'warmed' if report['warm'] else 'not warmed'}; others took "
            f"{report['others']:.0%} of the cores; {report['machine']['processor']}; Paceline "
            f"{report['versions']['commit']}.{builds}",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=["users", "stall", "prefix"])
    parser.add_argument("--prompts", type=Path, help="Of `users`; else our own.")
    parser.add_argument("--format", default="int8")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=8, help="Of a round at 1 user.")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--long", type=int, default=16, help="Times 19 words: the long prompt.")
    parser.add_argument("--settle", type=float, default=0.5, help="Seconds before it arrives.")
    parser.add_argument("--shared-characters", type=int, default=1000)
    parser.add_argument("--serve", nargs="*", default=[], help="Further flags of our server.")
    parser.add_argument(
        "--peer", nargs="+", default=["llama.cpp"], help="With flags, if any; see servers.py."
    )
    parser.add_argument("--llama-server", default="llama-server", help="llama.cpp's program.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    random.seed(0)
    model = load(options.model)
    peers = options.peer if "peers" in options.part else []
    report: dict[str, Any] = {
        "model": options.model.name,
        "format": options.format,
        "threads": options.threads,
        "rounds": options.rounds,
        "tokens": options.tokens,
        "warm": known_trace(model, model.config.vocab_size) is not None,
        "peers_are": {peer: build(options, peer) for peer in peers},
        "machine": machine(),
        "versions": versions(),
    }
    start = ticks()
    with TemporaryDirectory(prefix="paceline-") as name:
        for part in options.part:
            report[part] = PARTS[part][0](options, Path(name))
            report["others"] = busy_others(start, ticks())
            if options.json:
                options.json.write_text(json.dumps(report, indent=2))
    print(markdown(report))


if __name__ == "__main__":
    main()
