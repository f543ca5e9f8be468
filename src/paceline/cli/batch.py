"""`paceline batch`: a file of requests."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer

from paceline.cli import options
from paceline.cli.output import check_target, document, say
from paceline.cli.progress import counting
from paceline.errors import MethodError, RequestError


def batch(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            help="A .jsonl file: lines as in OpenAI's batches, or with `prompt` or `messages`.",
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="File to write.")],
    model: options.ModelOption = None,
    name: Annotated[str | None, typer.Option(help="What the model is called.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of lines that name no number; else the context.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of lines that name none.")] = 0,
    drafter: options.Drafter = "blend",
    budget: options.Budget = "auto",
    engine: options.Engine = "auto",
    weight_format: options.Format = "auto",
    kv_format: options.KvFormat = "auto",
    device: options.Device = None,
    threads: options.Threads = None,
    places: Annotated[int, typer.Option(min=1, help="Most requests that run at once.")] = 32,
    json: options.Json = False,
) -> None:
    """Answer a file of requests, many of them in each pass.

    Output lines are in the order of the input's. A line that cannot be run gets an `error` and
    does not stop the others. The output has its name when it is whole; until then it is
    OUTPUT.part, and the same command goes on where it stopped. Exit 1 if a line failed.
    """
    check_target(output)
    if not source.is_file():
        raise RequestError(f"cannot read {source}: it is not a file")
    try:
        from paceline.serving.batch import Settings, answered, read_lines, survey
    except ImportError as error:
        raise MethodError(f"batches need {error.name}; pip install 'paceline[serve]'") from None
    from paceline.core import Exactness
    from paceline.serving.journal import Journal
    from paceline.serving.worker import Worker

    found = survey(source)
    chosen = options.EngineChoice(engine, device, threads, weight_format, kv_format)
    lm = chosen.open(model, drafter, options.one_budget(budget))
    settings = Settings(name or lm.model.path.name, max_new_tokens, seed)
    job: dict[str, Any] = {
        "schema": "paceline-batch/1",
        "input": found.digest,
        "model": str(lm.model.path.resolve()),
        "name": settings.name,
        "formats": [weight_format, kv_format],
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "drafter": drafter if lm.method.exactness is Exactness.LOSSY else None,
    }
    start = perf_counter()
    with closing(Journal(output, job)) as journal, counting(found.lines, "lines") as tick:
        before = journal.lines
        tick(before)
        if before:
            say(f"goes on after {before} lines")
        worker = Worker(lm, places, queue=sys.maxsize)
        after = journal.done
        lines = (line for line in read_lines(source) if line.number > after)
        for number, line in answered(worker, lines, settings):
            journal.add(number, line)
            tick()
        journal.finish()
    seconds = perf_counter() - start
    say(
        f"wrote {output}: {journal.lines} lines, {journal.failed} with an error; "
        f"{worker.stats.tokens} tokens in {seconds:.1f} s"
    )
    if json:
        document(
            {
                "path": str(output),
                "lines": journal.lines,
                "failed": journal.failed,
                "before": before,
                "tokens": worker.stats.tokens,
                "seconds": seconds,
            }
        )
    if journal.failed:
        raise typer.Exit(1)
