"""`paceline watermark`: detect the watermark of a text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from paceline.cli import options
from paceline.cli.command import VerbCommand
from paceline.cli.files import read_stdin, read_text
from paceline.cli.output import document, write

watermark = typer.Typer(help="Find the watermark that `--watermark` puts into a text.")


@watermark.callback(invoke_without_command=False)
def verbs() -> None:
    """Find the watermark that `--watermark` puts into a text."""


@watermark.command(cls=VerbCommand)
def detect(
    text: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="File with the text; - reads stdin."),
    ],
    watermark: Annotated[str, typer.Option(help="As given to the verb that generated the text.")],
    model: options.ModelOption = None,
    resamples: Annotated[
        int,
        typer.Option(
            min=1, max=10**6, help="Random keys to compare with; p is at least 1 / (resamples + 1)."
        ),
    ] = 999,
    json: options.Json = False,
) -> None:
    """Test a text for a watermark, and print the p-value.

    The p-value is the probability that an unmarked text scores as high. `--model` is the checkpoint
    that is said to have generated the text; only its tokenizer is used.
    """
    mark = options.one_watermark(watermark)
    assert mark is not None  # the option is required
    said = read_stdin() if str(text) == "-" else read_text("the text", text)
    from paceline.models import load

    tokens = load(model).tokenizer.encode(said, special=False)
    detection = mark.detect(tokens, resamples)
    if json:
        document({"kind": mark.name, "tokens": len(tokens), **asdict(detection)})
        return
    bound = (
        "" if detection.p > 1 / (resamples + 1) or detection.measure != "alignment" else "at most "
    )
    verdict = "marked" if detection.p <= 0.01 else "not shown to be marked"
    write(
        f"{verdict} (p <= 0.01): p is {bound}{detection.p:.2g}, "
        f"{detection.measure} {detection.score:.2f} over {detection.scored} of "
        f"{len(tokens)} tokens\n"
    )
