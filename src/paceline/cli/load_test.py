"""`paceline load-test`: what users of a server would wait, and what it bears."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.cli import evaluation, options
from paceline.cli.output import say, show
from paceline.cli.progress import counting
from paceline.errors import PacelineError, RequestError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from paceline.measuring.load.client import ServerAddress
    from paceline.measuring.load.run import Reply, Traffic
    from paceline.measuring.prompts import Dialogue

_ROWS = {
    "ttft": "first token",
    "tpot": "each further token",
    "gap": "between pieces",
    "latency": "whole answer",
}


@dataclass(frozen=True)
class LoadPromptOptions(evaluation.SuiteOptions):
    """Prompts."""

    suite: Annotated[
        str | None,
        typer.Option(
            help="Suite that the prompts belong to: spec-bench; without --prompts those of the "
            "built-in questions that belong to its tasks."
        ),
    ] = None

    def read(self) -> list[Dialogue]:
        """Return the lines of the file or of the built-in questions, with a suite's tasks.

        Raises:
            RequestError: as `PromptOptions.read`, or there is no such suite.
        """
        from paceline.measuring.suites import read_tasks

        return read_tasks(self.file, self.limit, self.suite)


@dataclass(frozen=True)
class ArrivalOptions:
    """Arrivals."""

    rate: Annotated[
        float | None, typer.Option(help="Open loop: requests per second, Poisson arrivals.")
    ] = None
    users: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10_000,
            help="Closed loop: concurrent users, each sending its next request when answered.",
        ),
    ] = None
    requests: Annotated[
        int | None, typer.Option(min=1, help="Number of requests; each prompt once by default.")
    ] = None
    seconds: Annotated[
        float | None,
        typer.Option(help="Stop sending after this time; running requests are completed."),
    ] = None
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the arrivals; request N is sent with seed SEED + N.")
    ] = 0

    def traffic(self, prompts: int) -> Traffic:
        """Return the arrival process for a number of prompts.

        Raises:
            RequestError: a number is not above 0, or both or neither loop are named.
        """
        from paceline.measuring.load.run import Traffic

        _positive("--rate", self.rate)
        _positive("--seconds", self.seconds)
        end = prompts if self.requests is None and self.seconds is None else self.requests
        traffic = Traffic(self.rate, self.users, end, self.seconds, self.seed)
        traffic.check()
        return traffic


@dataclass(frozen=True)
class BodyOptions:
    """Requests."""

    model: Annotated[
        str | None,
        typer.Option(help="Name of the model on the server; its first model by default."),
    ] = None
    chat: Annotated[bool, typer.Option("--chat", help="Ask /chat/completions.")] = False
    max_new_tokens: options.NewTokens = 100
    temperature: Annotated[
        float | None, typer.Option(min=0, help="The server's default if left out.")
    ] = None
    body: Annotated[
        str | None,
        typer.Option(help="JSON object added to every request, e.g. '{\"ignore_eos\": true}'."),
    ] = None
    timeout: Annotated[float, typer.Option(help="Seconds after which a request is abandoned.")] = (
        600.0
    )
    key_variable: Annotated[
        str, typer.Option(help="The environment variable that holds the API key, if there is one.")
    ] = "OPENAI_API_KEY"

    def extra(self) -> dict[str, Any]:
        """Return the fields that `--body` adds to every request.

        Raises:
            RequestError: it is no JSON object.
        """
        if self.body is None:
            return {}
        try:
            extra = json.loads(self.body)
        except (ValueError, RecursionError):
            extra = None
        if not isinstance(extra, dict):
            raise RequestError(f"--body is {self.body!r:.80}, expected a JSON object")
        return extra

    def build(self, model: str, text: str, seed: int) -> dict[str, Any]:
        """Return the body of one request."""
        chat: dict[str, Any] = {"messages": [{"role": "user", "content": text}]}
        body = {
            "model": model,
            "max_tokens": self.max_new_tokens,
            "seed": seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.temperature is not None:
            body["temperature"] = self.temperature
        return (chat if self.chat else {"prompt": text}) | body | self.extra()


@dataclass(frozen=True)
class LatencyGoals:
    """Latency goals."""

    slo_ttft: Annotated[
        float | None, typer.Option(min=0, help="Maximum seconds to the first token.")
    ] = None
    slo_tpot: Annotated[
        float | None, typer.Option(min=0, help="Maximum seconds for each further token.")
    ] = None


def load_test(
    url: Annotated[str, typer.Argument(help="Address of a server, e.g. http://127.0.0.1:8000.")],
    *,
    prompt_options: LoadPromptOptions,
    arrivals: ArrivalOptions,
    body_options: BodyOptions,
    goals: LatencyGoals,
    report: evaluation.ReportOptions,
) -> None:
    """Load an OpenAI-compatible server and measure it.

    Of a line with several turns the first is sent. With --rate latencies count from when a request
    was due, so that a stall is charged to all requests that were due in it. Exit 1 if no answer was
    complete.
    """
    import asyncio

    from paceline.machine import machine, versions
    from paceline.measuring.load.client import ServerAddress
    from paceline.measuring.load.run import summary

    report.check()
    _positive("--timeout", body_options.timeout)
    body_options.extra()
    texts = [dialogue.turns[0] for dialogue in prompt_options.read()]
    traffic = arrivals.traffic(len(texts))
    server = ServerAddress.parse(url, os.environ.get(body_options.key_variable, ""))
    name, replies = asyncio.run(run(server, body_options, texts, traffic))
    if not replies:
        raise PacelineError("no request was due before the end; ask for more seconds")
    record = summary(replies, goals.slo_ttft, goals.slo_tpot)
    show(table(record), stdout=not report.json)
    failed = next((reply for reply in replies if reply.error), None)
    if failed is not None:
        said = f": {failed.detail}" if failed.detail else ""
        say(f"{len(replies) - record['completed']} failed; the first with {failed.error}{said}")
    report.deliver(
        {
            "schema": "paceline-load/1",
            "machine": machine(),
            "versions": versions(),
            "settings": settings(url, name, prompt_options, arrivals, body_options)
            | {"prompts": len(texts)},
            **record,
        }
    )
    if not record["completed"]:
        raise typer.Exit(1)


async def run(
    server: ServerAddress, body_options: BodyOptions, texts: list[str], traffic: Traffic
) -> tuple[str, list[Reply]]:
    """Send the requests; return the name of the model, and the replies."""
    from paceline.measuring.load.run import drive, first_model, sender

    name = body_options.model or await first_model(server)

    def asked(number: int) -> dict[str, Any]:
        return body_options.build(name, texts[number % len(texts)], traffic.seed + number)

    send = sender(server, asked, body_options.timeout)
    with counting(traffic.requests or 0, "requests") as tick:

        async def ticked(number: int, due: float) -> Reply:
            reply = await send(number, due)
            tick()
            return reply

        return name, await drive(ticked, traffic)


def settings(
    url: str,
    name: str,
    prompt_options: LoadPromptOptions,
    arrivals: ArrivalOptions,
    body_options: BodyOptions,
) -> dict[str, Any]:
    """Return the settings as the document holds them."""
    return {
        "url": url,
        "model": name,
        "loop": "open" if arrivals.rate is not None else "closed",
        "rate": arrivals.rate,
        "users": arrivals.users,
        "file": prompt_options.origin,
        "suite": prompt_options.suite,
        "chat": body_options.chat,
        "max_new_tokens": body_options.max_new_tokens,
        "temperature": body_options.temperature,
        "seed": arrivals.seed,
        "body": body_options.extra(),
    }


def _positive(name: str, value: float | None) -> None:
    if value is not None and not 0 < value < float("inf"):
        raise RequestError(f"{name} is {value:g}, expected a number above 0")


def table(record: dict[str, Any]) -> RenderableType:
    """Return a table of latencies in milliseconds, and the totals."""
    from rich.console import Group
    from rich.table import Table

    columns = ("mean", "p50", "p90", "p95", "p99", "max")
    waits = Table("milliseconds", *columns)
    for row, title in _ROWS.items():
        shown = record[row]
        waits.add_row(title, *(f"{shown[c] * 1e3:.1f}" if shown else "-" for c in columns))
    lines = [
        f"{record['completed']} of {record['requests']} answered in {record['seconds']:.1f} s: "
        f"{record['tokens_per_second']:.1f} tokens/s, "
        f"{record['requests_per_second']:.2f} requests/s"
    ]
    if record["errors"]:
        kinds = ", ".join(f"{kind}: {count}" for kind, count in record["errors"].items())
        lines.append(f"errors: {kinds}")
    if "slo" in record:
        kept = record["slo"]
        lines.append(f"in time: {kept['share']:.1%}, {kept['goodput']:.2f} requests/s")
    if record["tokens_counted_by"] == "pieces":
        lines.append("the server does not count tokens; a piece of a stream counts as one")
    return Group(waits, *lines)
