"""`paceline batch`: a file of requests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.cli import options, parsing
from paceline.cli.output import check_target, document, say
from paceline.cli.progress import counting
from paceline.cli.replicas import cluster_parts, model_paths
from paceline.errors import MethodError, RequestError

if TYPE_CHECKING:
    from paceline.serving.batch import BatchSettings
    from paceline.serving.output_journal import OutputJournal
    from paceline.serving.worker import Worker

Input = Annotated[
    Path,
    typer.Argument(
        metavar="INPUT",
        help="A .jsonl file: lines as in OpenAI's batches, or with `prompt` or `messages`.",
    ),
]
Output = Annotated[Path, typer.Argument(metavar="OUTPUT", help="File to write.")]


@dataclass(frozen=True)
class LineDefaults:
    """Defaults of lines."""

    name: Annotated[str | None, typer.Option(help="Name of the model in the output.")] = None
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Maximum new tokens of lines that give none; else the context's rest."
        ),
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of lines that give none.")] = 0
    temperature: Annotated[
        float | None, typer.Option(min=0, max=100, help="Temperature of lines that give none.")
    ] = None
    top_p: options.TopP = None
    top_k: options.TopK = None
    min_p: options.MinP = None
    repetition_penalty: options.RepetitionPenalty = None

    def sampling(self) -> dict[str, float]:
        """Return the sampling fields of lines that do not give them, in `sampler` neither.

        Raises:
            MethodError: a value is out of range.
        """
        from paceline.registry import controls

        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        for name, value in given.items():
            if name != "temperature":
                controls.single(name, value)
        return given

    def __post_init__(self) -> None:
        if self.name == "":
            raise RequestError("--name is empty, expected what the model is called")


@dataclass(frozen=True)
class ExecutionOptions:
    """Execution."""

    max_running: Annotated[int, typer.Option(min=1, help="Maximum number of running requests.")] = (
        32
    )
    ray: Annotated[
        str | None,
        typer.Option(help="Address of a Ray cluster that does the work; 'local' starts one here."),
    ] = None
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Engines on the cluster; one for each node.")
    ] = None

    def __post_init__(self) -> None:
        if self.replicas is not None and self.ray is None:
            raise RequestError("--replicas are engines on a Ray cluster; name it with --ray")


def batch(
    source: Input,
    output: Output,
    model: options.ModelOption = None,
    *,
    defaults: LineDefaults,
    execution: ExecutionOptions,
    drafting: options.DraftOptions,
    engine: options.EngineOptions,
    json: options.Json = False,
) -> None:
    """Answer a file of requests, many of them in each pass.

    Output lines are in the order of the input. A line that cannot be run gets an `error` and does
    not stop the others. Until the output is complete it is called OUTPUT.part, and the same command
    continues it. On a Ray cluster every node needs the model under the same path. Exit 1 if a line
    failed.
    """
    check_target(output)
    if not source.is_file():
        raise RequestError(f"cannot read {source}: it is not a file")
    try:
        from paceline.serving.batch import BatchSettings, summarize_input
    except ImportError as error:
        raise MethodError(f"batches need {error.name}; pip install 'paceline[serve]'") from None
    from paceline.models.hub import display_name
    from paceline.serving.output_journal import OutputJournal

    sampling = defaults.sampling()
    summary = summarize_input(source)
    paths = model_paths(model)
    settings = BatchSettings(
        defaults.name or display_name(paths[0]), defaults.max_new_tokens, defaults.seed, sampling
    )
    job = _job(summary.digest, model, paths, settings, engine, drafting)
    where = str(paths[0].resolve()) if len(paths) == 1 else model
    build = partial(_worker, engine, where, drafting, execution.max_running)
    start, tokens = perf_counter(), 0
    with (
        closing(OutputJournal(output, job)) as journal,
        counting(summary.lines, "lines") as tick,
    ):
        before = journal.lines
        tick(before, earlier=True)
        if before:
            say(f"continues after {before} lines")
        for number, line in _answers(
            build, engine.threads, execution, source, journal.done, settings, summary.lines
        ):
            journal.add(number, line)
            tokens += _written(line)
            tick()
        journal.finish()
    seconds = perf_counter() - start
    _report(output, journal, {"before": before, "tokens": tokens, "seconds": seconds}, json)
    if journal.failed:
        raise typer.Exit(1)


def _job(
    digest: str,
    model: str | None,
    paths: list[Path],
    settings: BatchSettings,
    engine: options.EngineOptions,
    drafting: options.DraftOptions,
) -> dict[str, Any]:
    """Return what the lines depend on; only a job with the same content is continued."""
    from paceline.registry import drafters

    lossy = parsing.lossy({drafting.drafter: drafters.parse(drafting.drafter)})
    optional = {
        "sampling": dict(settings.sampling),
        "attention": engine.attention,
        "exits": engine.exits,
        "kv_policy": engine.kv_policy,
        "rope": engine.rope,
        "memory": engine.memory,
    }
    return {
        "schema": "paceline-batch/1",
        "input": digest,
        "model": [str(path.resolve()) for path in paths],
        "weights": model if len(paths) > 1 else None,
        "name": settings.name,
        "formats": [engine.weight_format, engine.kv_format],
        "max_new_tokens": settings.max_new_tokens,
        "seed": settings.seed,
        "drafter": drafting.drafter if lossy else None,
        **{name: value for name, value in optional.items() if value},
    }


def _worker(
    engine: options.EngineOptions,
    model: str | None,
    drafting: options.DraftOptions,
    max_running: int,
    threads: int | None,
) -> Worker:
    from paceline.serving.worker import Worker

    lm = replace(engine, threads=threads).open(model, drafting.drafter, drafting.nodes)
    return Worker(lm, max_running, queue=sys.maxsize)


def _answers(
    build: Callable[[int | None], Worker],
    threads: int | None,
    execution: ExecutionOptions,
    source: Path,
    after: int,
    settings: BatchSettings,
    lines: int,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and result of each line after `after`, from this process or a cluster."""
    if execution.ray is None:
        from paceline.serving.batch import read_lines, run_batch

        rest = (line for line in read_lines(source) if line.number > after)
        yield from run_batch(build(threads), rest, settings)
        return
    join, data, _ = cluster_parts()
    with join.cluster(execution.ray):
        count = execution.replicas or join.nodes()
        each = partial(build, threads or join.processors(count))
        yield from data.run_batch_on_cluster(each, count, source, after, settings, lines)


def _report(
    output: Path, journal: OutputJournal, counts_of_run: dict[str, Any], json: bool
) -> None:
    say(
        f"wrote {output}: {journal.lines} lines, {journal.failed} with an error; "
        f"{counts_of_run['tokens']} tokens in {counts_of_run['seconds']:.1f} s"
    )
    if json:
        counts = {"path": str(output), "lines": journal.lines, "failed": journal.failed}
        document(counts | counts_of_run)


def _written(line: dict[str, Any]) -> int:
    """Return how many tokens a line's answers have."""
    response = line["response"]
    return int(response["body"]["usage"]["completion_tokens"]) if response else 0
