"""A server under well- and ill-behaved clients for minutes, and SIGTERM at the end.

    python benchmarks/soak.py --minutes 1 [--model FOLDER] [--users 8]
        [--kv-policies]

It starts `paceline serve` on a free port of this machine. Polite users ask for greedy and sampled
texts, streamed or whole, alone or several, with log-probabilities, echo, schemas and tools
(`soak_requests.py`); each finished answer must be what plain decoding gives alone with the same
seed: text, tool calls, tokens and their log-probabilities. With --kv-policies most requests name a
KV policy, several at once, and plain decoding under the same one is what they must equal. Hostile
users leave early, send half or broken JSON, wrong types, large bodies, half heads, and read slowly
or not at all. At the end the server gets SIGTERM while requests are under way. Prints a JSON
document and exits with 1 where something is wrong: a crash, an unexplained answer, another text,
pages or threads that stay, memory that grows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2 as httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.soak_requests import (
    OPENINGS,
    Answer,
    alone,
    differ,
    folder_with_template,
    random_request,
)
from paceline import LM

PROGRAM = [sys.executable, "-c", "from paceline.cli import main; main()", "serve", "--port", "0"]
TIGHT = ["--head-seconds", "2", "--body-seconds", "2", "--write-seconds", "3", "--queue", "16"]
FINISHES = {"stop", "length", "tool_calls", "cancelled"}
EXPLAINED = {200, 400, 401, 404, 408, 413, 429, 503}
GROWTH = 5e6  # bytes in the second half that are no growth: the allocator's habit


class Server:
    """The server's process and what is known of it."""

    def __init__(self, words: list[str]) -> None:
        self.process = subprocess.Popen([*PROGRAM, *words], stderr=subprocess.PIPE, text=True)
        assert self.process.stderr
        said = ""
        while not (found := re.search(r"http://127.0.0.1:(\d+)", said)):
            line = self.process.stderr.readline()
            if not line:
                sys.exit(f"the server did not start: {said}")
            said += line
        self.port, self.log = int(found[1]), Counter[str]()
        self.errors: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            try:
                entry = json.loads(line)
            except ValueError:
                self.errors.append(line)
                continue
            self.log[str(entry.get("status", entry["event"]))] += 1
            if entry["level"] == "error":
                self.errors.append(line)

    def figures(self) -> dict[str, float]:
        """Threads, memory and pages now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = {
            name: float(re.search(rf"{key}:\s+(\d+)", status)[1])  # type: ignore[index]
            for name, key in (("threads", "Threads"), ("rss", "VmRSS"))
        }
        found["rss"] *= 1024
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        for name in ("kv_pages_used", "kv_pages_limit", "running", "queue_length"):
            found[name] = float(re.search(rf"^paceline_{name} (\S+)", text, re.M)[1])  # type: ignore[index]
        return found

    def end(self) -> int:
        """Its exit code; it has got its signal."""
        try:
            code = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return -9
        self._reader.join(5)
        return code


class Soak:
    """Users of a server, and the outcomes of their requests."""

    def __init__(self, server: Server, minutes: float, seed: int, policies: bool = False) -> None:
        self.server, self.random, self.policies = server, random.Random(seed), policies
        self.stop = time.monotonic() + 60 * minutes
        self.ending = False
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.finished: list[tuple[dict[str, Any], list[Answer]]] = []

    def polite(self, user: int, stop: float) -> None:
        """Ask, read to the end, keep the answer; until `stop` or the server's end."""
        rng = random.Random(user)
        with httpx.Client(base_url=self.server.url, timeout=120) as client:
            while not self.ending and time.monotonic() < stop:
                path, body = random_request(rng, self.policies)
                try:
                    self._ask(client, path, body)
                except httpx.ConnectError:
                    if not self.ending:
                        self.wrong.append("no connection")
                except httpx.HTTPError as error:
                    # A kept connection that the server closes when it stops is no promise broken.
                    if not self.ending:
                        self.wrong.append(f"{type(error).__name__}: {error}")

    def _ask(self, client: httpx.Client, path: str, body: dict[str, Any]) -> None:
        answers = [Answer() for _ in range(body["n"])]
        with client.stream("POST", path, json=body) as answer:
            self.outcomes[f"polite {answer.status_code}"] += 1
            if answer.status_code != 200:
                said = json.loads(answer.read())["error"]["message"]
                if answer.status_code not in (429, 503) or "Retry-After" not in answer.headers:
                    self.wrong.append(f"{answer.status_code}: {said}")
                time.sleep(0.05)
                return
            if body["stream"]:
                lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
                if lines[-1:] != ["[DONE]"]:
                    self.wrong.append("a stream without its end")
                documents = [json.loads(line) for line in lines if line != "[DONE]"]
            else:
                documents = [json.loads(answer.read())]
        for choice in (choice for document in documents for choice in document["choices"]):
            answers[choice["index"]].add(choice)
        finishes = [each.finish for each in answers]
        for finish in finishes:
            self.outcomes[f"finish {finish}"] += 1
        if "" in finishes or not set(finishes) <= FINISHES:
            self.wrong.append(f"finished with {finishes}")
        elif "cancelled" not in finishes:
            self.finished.append((body, answers))
        elif not self.ending:
            self.wrong.append("cancelled, and nobody wanted that")

    def hostile(self, user: int) -> None:
        """Something else each time."""
        rng = random.Random(1000 + user)
        ways = (self._leave, self._nonsense, self._large, self._half, self._slow)
        while time.monotonic() < self.stop:
            way = rng.choice(ways)
            with contextlib.suppress(OSError):
                way(rng)
            self.outcomes[f"hostile {way.__name__[1:]}"] += 1
            time.sleep(rng.random() * 0.05)

    def _connect(self) -> socket.socket:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(30)
        client.connect(("127.0.0.1", self.server.port))
        return client

    def _leave(self, rng: random.Random) -> None:
        body = {"prompt": rng.choice(OPENINGS), "max_tokens": 400, "ignore_eos": True}
        body |= {"n": rng.randrange(1, 5), "stream": rng.random() < 0.5}
        with self._connect() as client:
            client.sendall(raw(json.dumps(body).encode()))
            time.sleep(rng.random() * 0.2)

    def _nonsense(self, rng: random.Random) -> None:
        values = (None, -1, 1e999, "x", [], {}, True, "\ud800", [[]], 10**30)
        names = ("prompt", "max_tokens", "temperature", "n", "stop", "seed", "logit_bias", "x")
        body: Any = {"prompt": "a", "max_tokens": 2} | {
            rng.choice(names): rng.choice(values) for _ in range(rng.randrange(1, 4))
        }
        content = json.dumps(body).encode()
        if rng.random() < 0.5:
            content = content[: rng.randrange(len(content))] + rng.randbytes(3)
        self._expect_explained(raw(content))

    def _large(self, rng: random.Random) -> None:
        head = raw(b"", length=10**9) if rng.random() < 0.5 else raw(b"", length=None)
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        with self._connect() as client:
            client.sendall(head)
            with contextlib.suppress(OSError):
                for _ in range(rng.randrange(40)):
                    client.sendall(chunk)
            client.recv(100)

    def _half(self, rng: random.Random) -> None:
        content = raw(b'{"prompt": "a", "max_tokens": 2}')
        with self._connect() as client:
            client.sendall(content[: rng.randrange(len(content))])
            if rng.random() < 0.3:  # stay: the server must leave first
                while client.recv(4096):
                    pass

    def _slow(self, rng: random.Random) -> None:
        body = {"prompt": "a", "max_tokens": 300, "ignore_eos": True, "n": 4, "stream": True}
        with self._connect() as client:
            client.sendall(raw(json.dumps(body | {"trace": True}).encode()))
            for _ in range(rng.randrange(20)):
                if not client.recv(512):
                    return
                time.sleep(0.05)
            if rng.random() < 0.3:
                time.sleep(rng.random() * 5)

    def _expect_explained(self, content: bytes) -> None:
        with self._connect() as client:
            client.sendall(content)
            line = client.recv(4096).split(b"\r\n")[0]
        status = int(line.split()[1]) if line else 0
        if line and status not in EXPLAINED:
            self.wrong.append(f"{status} for {content!r:.200}")


def raw(content: bytes, length: int | None = -1) -> bytes:
    """Return a request as bytes; with `length` None its body is chunked."""
    size = len(content) if length == -1 else length
    framing = "Transfer-Encoding: chunked" if size is None else f"Content-Length: {size}"
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{framing}"
    )
    return head.encode() + b"\r\n\r\n" + content


def start(call: Any, *words: Any) -> threading.Thread:
    """Start a user in a thread."""
    found = threading.Thread(target=call, args=words)
    found.start()
    return found


def watch(server: Server, soak: Soak, users: int) -> list[dict[str, float]]:
    """Return the server's figures under load."""
    threads = [start(soak.polite, user, soak.stop) for user in range(users)]
    threads += [start(soak.hostile, user) for user in range(users // 2)]
    points, begun = [], time.monotonic()
    while time.monotonic() < soak.stop and server.process.poll() is None:
        points.append(server.figures() | {"at": time.monotonic() - begun})
        time.sleep((soak.stop - begun) / 500)
    for thread in threads:
        thread.join()
    return points


def compare(lm: LM, soak: Soak) -> None:
    """Each finished answer with what the same request gets alone."""
    known: dict[str, Answer] = {}
    for body, answers in soak.finished:
        for place, answer in enumerate(answers):
            seed = body["seed"] + place if body["temperature"] else 0
            asked = {**body, "seed": seed, "n": 1, "stream": False}
            key = json.dumps(asked, sort_keys=True)
            if key not in known:
                known[key] = alone(lm, body, place)
            if wrong := differ(answer, known[key]):
                soak.wrong.append(f"{body!r:.400}, answer {place}: {wrong}")


def slope(points: list[dict[str, float]]) -> float:
    """Least squares, of the second half: bytes a minute."""
    half = [(p["at"], p["rss"]) for p in points[len(points) // 2 :]]
    middle = sum(at for at, _ in half) / len(half)
    spread = sum((at - middle) ** 2 for at, _ in half)
    return 60 * sum((at - middle) * value for at, value in half) / spread if spread else 0.0


def quiet(server: Server) -> dict[str, float]:
    """Return the server's figures once it is idle."""
    for _ in range(600):
        found = server.figures()
        if not found["running"] and not found["queue_length"]:
            return found
        time.sleep(0.1)
    return found


def main() -> int:
    """Run; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--model")
    parser.add_argument("--users", type=int, default=8, help="polite ones; half as many hostile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kv-policies", action="store_true", help="requests name KV policies")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return soaked(options, folder_with_template(options.model, Path(folder)))


def soaked(options: argparse.Namespace, model: str) -> int:
    """Run with a model that takes conversations."""
    choice = ["--kv-policy-choice"] if options.kv_policies else []
    server = Server([*TIGHT, "--model", model, "--drain", "30", *choice])
    soak = Soak(server, options.minutes, options.seed, options.kv_policies)
    before = quiet(server)
    points = watch(server, soak, options.users)
    after = quiet(server)
    last = [start(soak.polite, 100 + user, math.inf) for user in range(options.users)]
    while not server.figures()["running"]:
        time.sleep(0.01)
    soak.ending = True
    server.process.send_signal(signal.SIGTERM)
    code = server.end()
    for user in last:
        user.join()
    compare(LM(model), soak)
    half = points[len(points) // 2 :]
    faults = {
        "exit code": code != 0,
        "wrong answers": bool(soak.wrong),
        "log": bool(server.errors) or bool(server.log["500"]),
        "threads": after["threads"] > max(p["threads"] for p in points[: len(half)]),
        "pages": after["kv_pages_used"] > after["kv_pages_limit"] / 2,  # texts of the past
        "memory": half[-1]["rss"] - half[0]["rss"] > GROWTH,
    }
    report = {
        "minutes": options.minutes,
        "exit_code": code,
        "answers_compared": sum(len(answers) for _, answers in soak.finished),
        "answers_by_policy": dict(
            Counter(str(body.get("kv_policy", "none named")) for body, _ in soak.finished)
        ),
        "outcomes": dict(sorted(soak.outcomes.items())),
        "log": dict(sorted(server.log.items())),
        "before": before,
        "after": after,
        "most": {name: max(p[name] for p in points) for name in ("threads", "kv_pages_used")},
        "rss_mb": [round(p["rss"] / 1e6, 1) for p in points[:: max(len(points) // 10, 1)]],
        "rss_slope_mb_a_minute": round(slope(points) / 1e6, 3),
        "errors": server.errors[:5],
        "wrong": soak.wrong[:20],
        "faults": [name for name, found in faults.items() if found],
    }
    print(json.dumps(report, indent=2))
    return bool(report["faults"])


if __name__ == "__main__":
    sys.exit(main())
