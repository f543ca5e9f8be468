"""Our server under load: with speculation and without, while prompts arrive, and beside a peer.

    python benchmarks/serving.py MODEL [--part users stall prefix peers] [--rounds 5] [--json FILE]

MODEL is a checkpoint, e.g. a real one inflated by `paceline inflate`; `--format int8` is how its
weights are kept, by the peer too (Q8_0). Parts:

- `users`: tokens/s at 1 and 8 closed-loop users, budget auto against 0. The rounds take turns.
- `stall`: time between pieces of running streams, alone and while a long prompt arrives.
- `prefix`: time to first token of a second request over a shared prompt against the first.
- `peers`: time to first token, time per further token and tokens/s at 1, 4 and 16 users beside
  llama.cpp's server (`python -m llama_cpp.server`, one process, same threads).

Everything goes through HTTP on loopback, as users would; our server is a process of its own. Cells
are medians over rounds, with the least and the most. All answers have `--tokens` tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from paceline.measuring.http import Server
from paceline.measuring.load import Reply, Traffic, drive, first_model, sender, summary
from paceline.measuring.machine import machine, versions
from paceline.measuring.suites import read_tasks

PARTS = ("users", "stall", "prefix", "peers")
WORDS = "Once upon a time there was a little dog who liked to play in the park with his friend"


class Client:
    """Asks one server. Prompts are taken one after the other, each once for all servers alike."""

    def __init__(self, url: str, texts: list[str], tokens: int, **extra: Any) -> None:
        self.server, self.texts, self.tokens, self.extra = Server.parse(url), texts, tokens, extra
        self.model = asyncio.run(first_model(self.server))

    def body(self, prompt: str, tokens: int | None = None, **extra: Any) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": tokens or self.tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
            **extra,
        }

    def load(self, users: int, requests: int, first: int, **extra: Any) -> dict[str, Any]:
        """A closed loop; `first` is the number of the first prompt."""

        def body(number: int) -> dict[str, Any]:
            return self.body(self.texts[(first + number) % len(self.texts)], **extra)

        send = sender(self.server, body, 600.0)
        replies = asyncio.run(drive(send, Traffic(users=users, requests=requests)))
        check(replies)
        return summary(replies)


def check(replies: list[Reply]) -> None:
    """Refuse to report on failures."""
    for reply in replies:
        if reply.error:
            raise SystemExit(f"a request failed with {reply.error}: {reply.detail}")


@contextmanager
def running(words: list[str], url: str, log: Path) -> Iterator[str]:
    """A server's process, from when it answers."""
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file)
        try:
            for _ in range(600):
                if process.poll() is not None:
                    raise SystemExit(f"{words[2]} ended: {log.read_text()[-2000:]}")
                try:
                    asyncio.run(first_model(Server.parse(url)))
                    break
                except Exception:
                    time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def ours(options: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Our server."""
    port = free_port()
    words = [sys.executable, "-c", "from paceline.cli import main; main()", "serve"]
    words += ["--model", str(options.model), "--port", str(port), "--format", options.format]
    words += ["--threads", str(options.threads), "--places", "16", *options.serve]
    with running(words, f"http://127.0.0.1:{port}", folder / "ours.log") as url:
        yield url


@contextmanager
def llama_cpp(options: argparse.Namespace, folder: Path) -> Iterator[str]:
    """llama.cpp's server by its binding, on a GGUF file of the same weights."""
    import gguf_file

    from paceline.models import load

    model, port = load(options.model), free_port()
    kind = {"int8": "Q8_0", "int4": "Q4_0", "fp16": "F16"}.get(options.format)
    if kind is None:
        raise SystemExit(f"the peer has no weights in {options.format}; take int8, int4 or fp16")
    path = folder / "model.gguf"
    gguf_file.write(path, model.config, model.weights, kind, options.model / "tokenizer.json")
    words = [options.peer_python, "-m", "llama_cpp.server", "--model", str(path)]
    words += ["--host", "127.0.0.1", "--port", str(port), "--n_threads", str(options.threads)]
    words += ["--n_threads_batch", str(options.threads), "--n_ctx", str(model.config.context)]
    with running(words, f"http://127.0.0.1:{port}", folder / "peer.log") as url:
        yield url


def users_part(options: argparse.Namespace, client: Client) -> dict[str, Any]:
    """Budget auto against 0; the same prompts in both, in turn."""
    found: dict[str, Any] = {}
    arms = {"auto": {}, "plain": {"speculation": {"budget": 0}}}
    for users in (1, 8):
        requests = options.requests * (1 if users == 1 else 3)
        rounds: list[dict[str, float]] = []
        for number in range(options.rounds + 1):
            order = list(arms) if number % 2 else list(arms)[::-1]
            speeds = {
                arm: client.load(users, requests, number * requests, **arms[arm])[
                    "tokens_per_second"
                ]
                for arm in order
            }
            if number:  # the first warms up
                rounds.append(speeds)
        ratios = [each["auto"] / each["plain"] for each in rounds]
        found[str(users)] = {
            "tokens_per_second": {arm: median(each[arm] for each in rounds) for arm in arms},
            "ratio": median(ratios),
            "least": min(ratios),
            "most": max(ratios),
        }
    return found


def stall_part(options: argparse.Namespace, client: Client) -> dict[str, Any]:
    """Gaps between the pieces of streams that run, alone and while a long prompt arrives.

    `one_pass` is the median gap alone at the same number of streams, each plain, so that a gap is
    one pass.
    """
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


def prefix_part(options: argparse.Namespace, client: Client) -> dict[str, Any]:
    """Time to first token over one long beginning: new, and known."""
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


def peers_part(options: argparse.Namespace, clients: dict[str, Client]) -> dict[str, Any]:
    """Each server in turn, at each number of users."""
    found: dict[str, Any] = {}
    turns = count()
    for users in (1, 4, 16):
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in clients}
        requests = max(options.requests, 2 * users)
        for number in range(options.rounds + 1):
            first = next(turns) * requests
            for name, client in clients.items():
                got = client.load(users, requests, first)
                if number:
                    rounds[name].append(got)
        found[str(users)] = {
            name: {
                "ttft_p50": median(each["ttft"]["p50"] for each in got),
                "tpot_p50": median(each["tpot"]["p50"] for each in got),
                "tokens_per_second": median(each["tokens_per_second"] for each in got),
                "tokens_counted_by": got[0]["tokens_counted_by"],
                "tokens": got[0]["tokens"],
            }
            for name, got in rounds.items()
        }
    return found


def markdown(report: dict[str, Any]) -> str:
    """Tables of what was measured, and the conditions."""
    lines: list[str] = []
    if part := report.get("users"):
        lines += [
            "| users | auto, tok/s | plain, tok/s | ratio | rounds |",
            "|---:|---:|---:|---:|---|",
        ]
        for users, row in part.items():
            speeds = row["tokens_per_second"]
            lines.append(
                f"| {users} | {speeds['auto']:.1f} | {speeds['plain']:.1f} | {row['ratio']:.2f} "
                f"| {row['least']:.2f} to {row['most']:.2f} |"
            )
    if (part := report.get("stall")) and part["during_p99"]:
        lines += [
            "",
            f"Between tokens: one pass {part['one_pass'] * 1e3:.1f} ms; 99th percentile "
            f"{part['alone_p99'] * 1e3:.1f} ms alone, {part['during_p99'] * 1e3:.1f} ms while a "
            f"long prompt comes: {part['p99_by_pass']:.2f} of a pass, {part['gaps_during']} gaps.",
        ]
    if part := report.get("prefix"):
        lines += [
            "",
            f"First token over a shared prompt: {part['first'] * 1e3:.0f} ms, then "
            f"{part['second'] * 1e3:.0f} ms: {part['share']:.0%}.",
        ]
    if part := report.get("peers"):
        lines += [
            "",
            "| users | server | first token, ms | each further, ms | tok/s |",
            "|---:|---|---:|---:|---:|",
        ]
        for users, row in part.items():
            lines += [
                f"| {users} | {name} | {each['ttft_p50'] * 1e3:.0f} | "
                f"{each['tpot_p50'] * 1e3:.1f} | {each['tokens_per_second']:.1f} |"
                for name, each in row.items()
            ]
    lines += [
        "",
        f"{report['model']}, {report['format']}, {report['threads']} threads, answers of "
        f"{report['tokens']} tokens, medians of {report['rounds']} rounds; "
        f"{report['machine']['processor']}; Paceline {report['versions']['commit']}.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS[:3]))
    parser.add_argument("--prompts", type=Path, help="Of users and peers; else our own.")
    parser.add_argument("--format", default="int8")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=8, help="Of a round at 1 user.")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--long", type=int, default=16, help="Times 19 words: the long prompt.")
    parser.add_argument("--settle", type=float, default=0.5, help="Seconds before it arrives.")
    parser.add_argument("--shared-characters", type=int, default=1000)
    parser.add_argument("--serve", nargs="*", default=[], help="Further flags of our server.")
    parser.add_argument("--peer-python", default=sys.executable, help="Has llama_cpp.server.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    random.seed(0)
    texts = [f"{WORDS[: 20 + 3 * n]} " for n in range(20)]
    if options.prompts:
        texts = [dialogue.turns[0] for dialogue in read_tasks(options.prompts)]
    report: dict[str, Any] = {
        "model": options.model.name,
        "format": options.format,
        "threads": options.threads,
        "rounds": options.rounds,
        "tokens": options.tokens,
        "machine": machine(),
        "versions": versions(),
    }
    parts = {"users": users_part, "stall": stall_part, "prefix": prefix_part}
    with TemporaryDirectory(prefix="paceline-") as name, ours(options, Path(name)) as url:
        client = Client(url, texts, options.tokens, ignore_eos=True, seed=0)
        for part in options.part:
            if part == "peers":
                with llama_cpp(options, Path(name)) as other:
                    peer = Client(other, texts, options.tokens, seed=0)
                    clients = {"paceline": client, "llama.cpp": peer}
                    report[part] = peers_part(options, clients)
            else:
                report[part] = parts[part](options, client)
            if options.json:
                options.json.write_text(json.dumps(report, indent=2))
    print(markdown(report))


if __name__ == "__main__":
    main()
