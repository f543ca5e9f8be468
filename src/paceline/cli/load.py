"""`paceline load`: what users of a server would wait, and what it bears."""

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

    from paceline.measuring.load.client import Server
    from paceline.measuring.load.run import Reply, Traffic

_ROWS = {
    "ttft": "first token",
    "tpot": "each further token",
    "gap": "between pieces",
    "latency": "whole answer",
}


@dataclass(frozen=True)
class Arriving:
    """When requests come."""

    rate: Annotated[
        float | None, typer.Option(help="Open loop: so many requests arrive a second, by chance.")
    ] = None
    users: Annotated[
        int | None,
        typer.Option(min=1, max=10_000, help="Closed loop: each asks again once answered."),
    ] = None
    requests: Annotated[
        int | None, typer.Option(min=1, help="So many; each prompt once if nothing is said.")
    ] = None
    seconds: Annotated[
        float | None, typer.Option(help="Send none after them; those under way are waited for.")
    ] = None
    seed: Annotated[
        int, typer.Option(min=0, help="Of arrivals; request N is asked with SEED + N.")
    ] = 0

    def traffic(self, prompts: int) -> Traffic:
        """When they come, where there are so many prompts.

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
class Bodies:
    """How they are asked."""

    model: Annotated[
        str | None, typer.Option(help="Its name there; the server's first if left out.")
    ] = None
    chat: Annotated[bool, typer.Option("--chat", help="Ask /chat/completions.")] = False
    max_new_tokens: options.NewTokens = 100
    temperature: Annotated[
        float | None, typer.Option(min=0, help="The server's default if left out.")
    ] = None
    body: Annotated[
        str | None,
        typer.Option(help="JSON object that is added to each, e.g. '{\"ignore_eos\": true}'."),
    ] = None
    timeout: Annotated[float, typer.Option(help="Seconds; then a request is given up.")] = 600.0
    key_variable: Annotated[
        str, typer.Option(help="The environment variable that holds the API key, if there is one.")
    ] = "OPENAI_API_KEY"

    def extra(self) -> dict[str, Any]:
        """What `--body` adds to each.

        Raises:
            RequestError: it is no JSON object.
        """
        if self.body is None:
            return {}
        try:
            found = json.loads(self.body)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise RequestError(f"--body is {self.body!r:.80}, expected a JSON object")
        return found

    def ask(self, model: str, text: str, seed: int) -> dict[str, Any]:
        """The body of one request."""
        shown: dict[str, Any] = {"messages": [{"role": "user", "content": text}]}
        found = {
            "model": model,
            "max_tokens": self.max_new_tokens,
            "seed": seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.temperature is not None:
            found["temperature"] = self.temperature
        return (shown if self.chat else {"prompt": text}) | found | self.extra()


@dataclass(frozen=True)
class Goals:
    """What answers may take."""

    slo_ttft: Annotated[
        float | None, typer.Option(min=0, help="Seconds that a first token may take.")
    ] = None
    slo_tpot: Annotated[
        float | None, typer.Option(min=0, help="Seconds that each further token may take.")
    ] = None


def load(
    url: Annotated[str, typer.Argument(help="Of a server, e.g. http://127.0.0.1:8000.")],
    *,
    questions: evaluation.SuiteQuestions,
    arriving: Arriving,
    bodies: Bodies,
    goals: Goals,
    report: evaluation.Report,
) -> None:
    """Load an OpenAI-compatible server and measure it.

    Of a line with several turns the first is asked. With --rate waits count from when a request
    was due, so that a stall is charged to all who came in it. Exit 1 if no answer was complete.
    """
    import asyncio

    from paceline.machine import machine, versions
    from paceline.measuring.load.client import Server
    from paceline.measuring.load.run import summary

    report.check()
    _positive("--timeout", bodies.timeout)
    bodies.extra()
    texts = [dialogue.turns[0] for dialogue in questions.read()]
    traffic = arriving.traffic(len(texts))
    server = Server.parse(url, os.environ.get(bodies.key_variable, ""))
    name, replies = asyncio.run(run(server, bodies, texts, traffic))
    if not replies:
        raise PacelineError("no request was due before the end; ask for more seconds")
    found = summary(replies, goals.slo_ttft, goals.slo_tpot)
    show(table(found), stdout=not report.json)
    failed = next((reply for reply in replies if reply.error), None)
    if failed is not None:
        said = f": {failed.detail}" if failed.detail else ""
        say(f"{len(replies) - found['completed']} failed; the first with {failed.error}{said}")
    report.deliver(
        {
            "schema": "paceline-load/1",
            "machine": machine(),
            "versions": versions(),
            "settings": settings(url, name, questions, arriving, bodies) | {"prompts": len(texts)},
            **found,
        }
    )
    if not found["completed"]:
        raise typer.Exit(1)


async def run(
    server: Server, bodies: Bodies, texts: list[str], traffic: Traffic
) -> tuple[str, list[Reply]]:
    """The name of the model that was asked, and the replies."""
    from paceline.measuring.load.run import drive, first_model, sender

    name = bodies.model or await first_model(server)

    def asked(number: int) -> dict[str, Any]:
        return bodies.ask(name, texts[number % len(texts)], traffic.seed + number)

    send = sender(server, asked, bodies.timeout)
    with counting(traffic.requests or 0, "requests") as tick:

        async def ticked(number: int, due: float) -> Reply:
            reply = await send(number, due)
            tick()
            return reply

        return name, await drive(ticked, traffic)


def settings(
    url: str, name: str, questions: evaluation.SuiteQuestions, arriving: Arriving, bodies: Bodies
) -> dict[str, Any]:
    """What was asked for, as the document tells it."""
    return {
        "url": url,
        "model": name,
        "loop": "open" if arriving.rate is not None else "closed",
        "rate": arriving.rate,
        "users": arriving.users,
        "file": str(questions.prompts),
        "suite": questions.suite,
        "chat": bodies.chat,
        "max_new_tokens": bodies.max_new_tokens,
        "temperature": bodies.temperature,
        "seed": arriving.seed,
        "body": bodies.extra(),
    }


def _positive(name: str, value: float | None) -> None:
    if value is not None and not 0 < value < float("inf"):
        raise RequestError(f"{name} is {value:g}, expected a number above 0")


def table(found: dict[str, Any]) -> RenderableType:
    """Waits in milliseconds, and what was answered."""
    from rich.console import Group
    from rich.table import Table

    columns = ("mean", "p50", "p90", "p95", "p99", "max")
    waits = Table("milliseconds", *columns)
    for row, title in _ROWS.items():
        shown = found[row]
        waits.add_row(title, *(f"{shown[c] * 1e3:.1f}" if shown else "-" for c in columns))
    lines = [
        f"{found['completed']} of {found['requests']} answered in {found['seconds']:.1f} s: "
        f"{found['tokens_per_second']:.1f} tokens/s, {found['requests_per_second']:.2f} requests/s"
    ]
    if found["errors"]:
        kinds = ", ".join(f"{kind}: {count}" for kind, count in found["errors"].items())
        lines.append(f"errors: {kinds}")
    if "slo" in found:
        kept = found["slo"]
        lines.append(f"in time: {kept['share']:.1%}, {kept['goodput']:.2f} requests/s")
    if found["tokens_counted_by"] == "pieces":
        lines.append("the server does not count tokens; a piece of a stream counts as one")
    return Group(waits, *lines)
