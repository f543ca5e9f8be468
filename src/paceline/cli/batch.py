"""`paceline batch`: a file of requests."""

from __future__ import annotations

import sys
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer

from paceline.cli import options
from paceline.cli.output import check_target, document, say
from paceline.cli.progress import counting
from paceline.cli.replicas import cluster_parts, model_paths
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
    ray: Annotated[
        str | None,
        typer.Option(help="Address of a Ray cluster that does the work; 'local' starts one here."),
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Engines on the cluster; one for each node.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Answer a file of requests, many of them in each pass.

    Output lines are in the order of the input's. A line that cannot be run gets an `error` and
    does not stop the others. The output has its name when it is whole; until then it is
    OUTPUT.part, and the same command goes on where it stopped. On a Ray cluster every node needs
    the model where --model says. Exit 1 if a line failed.
    """
    check_target(output)
    if not source.is_file():
        raise RequestError(f"cannot read {source}: it is not a file")
    try:
        from paceline.serving.batch import Settings, answered, read_lines, survey
    except ImportError as error:
        raise MethodError(f"batches need {error.name}; pip install 'paceline[serve]'") from None
    from paceline.registry import drafters
    from paceline.serving.journal import Journal
    from paceline.serving.worker import Worker

    if replicas is not None and ray is None:
        raise RequestError("--replicas are engines on a Ray cluster; name it with --ray")
    found = survey(source)
    paths = model_paths(model)
    settings = Settings(name or paths[0].name, max_new_tokens, seed)
    job: dict[str, Any] = {
        "schema": "paceline-batch/1",
        "input": found.digest,
        "model": [str(path.resolve()) for path in paths],
        "weights": model if len(paths) > 1 else None,
        "name": settings.name,
        "formats": [weight_format, kv_format],
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "drafter": drafter if options.lossy({drafter: drafters.parse(drafter)}) else None,
    }
    chosen = options.EngineChoice(engine, device, threads, weight_format, kv_format)
    nodes = options.one_budget(budget)
    where = str(paths[0].resolve()) if len(paths) == 1 else model

    def build(threads: int | None) -> Worker:
        lm = replace(chosen, threads=threads).open(where, drafter, nodes)
        return Worker(lm, places, queue=sys.maxsize)

    start, tokens = perf_counter(), 0
    with (
        closing(Journal(output, job)) as journal,
        counting(found.lines, "lines") as tick,
        ExitStack() as stack,
    ):
        before, after = journal.lines, journal.done
        tick(before)
        if before:
            say(f"goes on after {before} lines")
        if ray is None:
            rest = (line for line in read_lines(source) if line.number > after)
            results = answered(build(threads), rest, settings)
        else:
            join, data, _ = cluster_parts()
            stack.enter_context(join.cluster(ray))
            count = replicas or join.nodes()
            each = partial(build, threads or join.processors(count))
            results = data.answered_by(each, count, source, after, settings, found.lines)
        for number, line in results:
            journal.add(number, line)
            tokens += _written(line)
            tick()
        journal.finish()
    seconds = perf_counter() - start
    say(
        f"wrote {output}: {journal.lines} lines, {journal.failed} with an error; "
        f"{tokens} tokens in {seconds:.1f} s"
    )
    if json:
        document(
            {
                "path": str(output),
                "lines": journal.lines,
                "failed": journal.failed,
                "before": before,
                "tokens": tokens,
                "seconds": seconds,
            }
        )
    if journal.failed:
        raise typer.Exit(1)


def _written(line: dict[str, Any]) -> int:
    """Tokens of a line's answers."""
    response = line["response"]
    return int(response["body"]["usage"]["completion_tokens"]) if response else 0
