"""Servers as the benchmarks start and ask them, each a process of its own: ours and llama.cpp's.

llama.cpp's is its own server (continuous batching, a slot for each user), from one of

- `llama.cpp`: a `llama-server` that was built for this processor; `benchmarks/README.md` tells how.
  What follows the name are further flags of it: `llama.cpp --kv-unified`, or, with drafts of its
  own, `llama.cpp --spec-type ngram-simple`;
- `xllamacpp`: the ready wheel of that name, whose kernels stop at AVX2.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gguf_file

from paceline.measuring.load.client import ServerAddress, request
from paceline.measuring.load.run import Reply, Traffic, drive, first_model, sender, summary
from paceline.models import load

Prompt = str | Sequence[int]

HOST = "127.0.0.1"
PATIENCE = 120.0  # seconds for a server to answer at all
KINDS = {"int8": "Q8_0", "int4": "Q4_0", "fp16": "F16"}  # our format -> theirs


class Client:
    """Asks one server; all answers have the same number of tokens, past the model's end if need be.

    Args:
        url: where it is.
        tokens: of an answer.
        extra: further fields of every body.
    """

    def __init__(self, url: str, tokens: int, **extra: Any) -> None:
        self.server, self.tokens, self.extra = ServerAddress.parse(url), tokens, extra
        self.model = asyncio.run(first_model(self.server))

    def body(self, prompt: Prompt, tokens: int | None = None, **extra: Any) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": tokens or self.tokens,
            "temperature": 0.0,
            "seed": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
            **extra,
        }

    def load(self, users: int, prompts: Sequence[Prompt], **extra: Any) -> dict[str, Any]:
        """Run a closed loop until every prompt was answered.

        Raises:
            SystemExit: one was not, or not with so many tokens.
        """
        send = sender(self.server, lambda number: self.body(prompts[number], **extra), 600.0)
        replies = asyncio.run(drive(send, Traffic(users=users, requests=len(prompts))))
        check(replies)
        found = summary(replies)
        if found["tokens"] != self.tokens * len(prompts):
            raise SystemExit(
                f"{self.model} gave {found['tokens']} tokens in {len(prompts)} answers, expected "
                f"{self.tokens} in each"
            )
        return found

    def text(self, prompt: Prompt, tokens: int) -> str:
        """Return the beginning of an answer.

        Raises:
            SystemExit: there is none.
        """

        async def ask() -> dict[str, Any]:
            body = self.body(prompt, tokens, stream=False)
            del body["stream_options"]
            async with request(self.server, "/completions", body) as answer:
                return await answer.json()

        found = asyncio.run(ask())
        if "choices" not in found:
            raise SystemExit(f"{self.model} does not answer: {found}")
        return str(found["choices"][0]["text"])


def check(replies: list[Reply]) -> None:
    """Refuse to report on failures."""
    for reply in replies:
        if reply.error:
            raise SystemExit(f"a request failed with {reply.error}: {reply.detail}")


@contextmanager
def running(words: Callable[[int], list[str]], log: Path) -> Iterator[str]:
    """Start a server and yield its process and address once it answers."""
    port = free_port()
    url, end = f"http://{HOST}:{port}", time.monotonic() + PATIENCE
    with log.open("w") as file:
        process = subprocess.Popen(words(port), stdout=file, stderr=file)
        try:
            while not _answers(url):
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"{words(port)[0]} does not serve: {log.read_text()[-2000:]}")
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(url: str) -> bool:
    try:
        asyncio.run(first_model(ServerAddress.parse(url)))
    except Exception:
        return False
    return True


def free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


@contextmanager
def ours(options: argparse.Namespace, folder: Path, *flags: str) -> Iterator[Client]:
    """Our server, with `flags` besides those of all parts."""

    def words(port: int) -> list[str]:
        return [
            *(sys.executable, "-c", "from paceline.cli import main; main()", "serve"),
            *("--model", str(options.model), "--port", str(port), "--format", options.format),
            *("--threads", str(options.threads), "--max-running", "16", *flags, *options.serve),
        ]

    with running(words, folder / f"ours{''.join(flags)}.log") as url:
        yield Client(url, options.tokens)


@contextmanager
def llama_cpp(
    options: argparse.Namespace, file: Path, peer: str, users: int, context: int
) -> Iterator[Client]:
    """llama.cpp's server on a GGUF file: a slot for each user, with the whole context in each."""
    name, *flags = shlex.split(peer)
    program = _program(options, name)

    def words(port: int) -> list[str]:
        return [
            *(*program, "--model", str(file), "--host", HOST, "--port", str(port)),
            *("--threads", str(options.threads), "--threads-batch", str(options.threads)),
            *("--parallel", str(users), "--ctx-size", str(users * context)),
            *flags,
        ]

    with running(words, file.parent / f"{peer.replace('/', '_')} {users}.log") as url:
        yield Client(url, options.tokens)


def build(options: argparse.Namespace, peer: str) -> str:
    """Describe a peer for the report.

    Raises:
        SystemExit: it is not there.
    """
    name, *flags = shlex.split(peer)
    if name == "xllamacpp":
        if flags:
            raise SystemExit(f"xllamacpp takes no {flags[0]}; flags are for llama.cpp")
        try:
            return f"xllamacpp {version('xllamacpp')}"
        except PackageNotFoundError:
            raise SystemExit("xllamacpp is missing: `pip install xllamacpp`") from None
    if name != "llama.cpp":
        raise SystemExit(f"no peer {peer!r}; known: llama.cpp, xllamacpp")
    program = shutil.which(options.llama_server)
    if program is None:
        raise SystemExit(
            f"there is no program {options.llama_server}; build it as benchmarks/README.md tells, "
            "name it by --llama-server, or take --peer xllamacpp"
        )
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    lines = (said.stdout + said.stderr).splitlines()
    return next((line for line in lines if line.startswith("version")), lines[0])


def gguf(options: argparse.Namespace, folder: Path) -> Path:
    """Write the same weights as a file for llama.cpp.

    Raises:
        SystemExit: it has no such format.
    """
    kind = KINDS.get(options.format)
    if kind is None:
        raise SystemExit(f"the peer has no weights in {options.format}; take {', '.join(KINDS)}")
    path = folder / "model.gguf"
    gguf_file.write_model(path, load(options.model), kind)
    return path


def _program(options: argparse.Namespace, name: str) -> list[str]:
    if name == "xllamacpp":
        return [sys.executable, str(Path(__file__).with_name("wheel_server.py"))]
    return [options.llama_server]
