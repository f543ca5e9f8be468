"""`paceline load`: what users of a server would wait, and what it bears."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from paceline.cli import options
from paceline.cli.output import check_target, say, show
from paceline.cli.progress import counting
from paceline.cli.work import deliver
from paceline.errors import PacelineError, RequestError

_ROWS = {
    "ttft": "first token",
    "tpot": "each further token",
    "gap": "between pieces",
    "latency": "whole answer",
}


def load(
    url: Annotated[str, typer.Argument(help="Of a server, e.g. http://127.0.0.1:8000.")],
    prompts: options.Prompts,
    rate: Annotated[
        float | None, typer.Option(help="Open loop: so many requests arrive a second, by chance.")
    ] = None,
    users: Annotated[
        int | None,
        typer.Option(min=1, max=10_000, help="Closed loop: each asks again once answered."),
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, help="So many; each prompt once if nothing is said.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Send none after them; those under way are waited for.")
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="The prompts are those of a suite: spec-bench.")
    ] = None,
    limit: options.Limit = None,
    model: Annotated[
        str | None, typer.Option(help="Its name there; the server's first if left out.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask /chat/completions.")] = False,
    max_new_tokens: options.NewTokens = 100,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="The server's default if left out.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals; request N is asked with SEED + N.")] = 0,
    body: Annotated[
        str | None,
        typer.Option(help="JSON object that is added to each, e.g. '{\"ignore_eos\": true}'."),
    ] = None,
    slo_ttft: Annotated[
        float | None, typer.Option(min=0, help="Seconds that a first token may take.")
    ] = None,
    slo_tpot: Annotated[
        float | None, typer.Option(min=0, help="Seconds that each further token may take.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds; then a request is given up.")] = 600.0,
    key_variable: Annotated[
        str, typer.Option(help="The environment variable that holds the API key, if there is one.")
    ] = "OPENAI_API_KEY",
    out: options.Out = None,
    json: options.Json = False,
) -> None:
    """Load an OpenAI-compatible server and measure it.

    Of a line with several turns the first is asked. With --rate waits count from when a request
    was due, so that a stall is charged to all who came in it. Exit 1 if no answer was complete.
    """
    import asyncio

    from paceline.measuring.http import Server
    from paceline.measuring.load import Traffic, drive, first_model, sender, summary
    from paceline.measuring.machine import machine, versions
    from paceline.measuring.suites import read_tasks

    check_target(out)
    for name, value in {"--rate": rate, "--seconds": seconds, "--timeout": timeout}.items():
        if value is not None and not 0 < value < float("inf"):
            raise RequestError(f"{name} is {value:g}, expected a number above 0")
    extra = _object(body)
    texts = [dialogue.turns[0] for dialogue in read_tasks(prompts, limit, suite)]
    server = Server.parse(url, os.environ.get(key_variable, ""))
    end = len(texts) if requests is None and seconds is None else requests
    traffic = Traffic(rate, users, end, seconds, seed)

    def asked(name: str, number: int) -> dict[str, Any]:
        text = texts[number % len(texts)]
        shown: dict[str, Any] = {"messages": [{"role": "user", "content": text}]}
        found = {
            "model": name,
            "max_tokens": max_new_tokens,
            "seed": seed + number,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if temperature is not None:
            found["temperature"] = temperature
        return (shown if chat else {"prompt": text}) | found | extra

    async def run() -> tuple[str, list[Any]]:
        name = model or await first_model(server)
        send = sender(server, lambda number: asked(name, number), timeout)

        async def ticked(number: int, due: float) -> Any:
            reply = await send(number, due)
            tick()
            return reply

        return name, await drive(ticked, traffic)

    with counting(end or 0, "requests") as tick:
        name, replies = asyncio.run(run())
    if not replies:
        raise PacelineError("no request was due before the end; ask for more seconds")
    found = summary(replies, slo_ttft, slo_tpot)
    failed = next((reply for reply in replies if reply.error), None)
    document = {
        "schema": "paceline-load/1",
        "machine": machine(),
        "versions": versions(),
        "settings": {
            "url": url,
            "model": name,
            "loop": "open" if rate is not None else "closed",
            "rate": rate,
            "users": users,
            "file": str(prompts),
            "suite": suite,
            "prompts": len(texts),
            "chat": chat,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "body": extra,
        },
        **found,
    }
    _show(found, json)
    if failed is not None:
        said = f": {failed.detail}" if failed.detail else ""
        say(f"{len(replies) - found['completed']} failed; the first with {failed.error}{said}")
    deliver(document, out, json)
    if not found["completed"]:
        raise typer.Exit(1)


def _object(text: str | None) -> dict[str, Any]:
    import json

    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise RequestError(f"--body is {text!r:.80}, expected a JSON object")
    return found


def _show(found: dict[str, Any], json: bool) -> None:
    from rich.table import Table

    columns = ("mean", "p50", "p90", "p95", "p99", "max")
    table = Table("milliseconds", *columns)
    for row, title in _ROWS.items():
        shown = found[row]
        table.add_row(title, *(f"{shown[c] * 1e3:.1f}" if shown else "-" for c in columns))
    show(table, stdout=not json)
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
    show("\n".join(lines), stdout=not json)
