"""`paceline compress`: make a checkpoint smaller, and measure what that costs and brings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.cli import options
from paceline.cli.files import read_text
from paceline.cli.output import document, say, write
from paceline.cli.progress import counting

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from paceline.compress.calibrate import Calibration, Writer
    from paceline.compress.checkpoint import Size
    from paceline.compress.recipe import Recipe
    from paceline.models import Model


@dataclass(frozen=True)
class CalibrationOptions:
    """Calibration."""

    calibration: Annotated[
        str,
        typer.Option(
            help="`mixed`: documentation, code and the model's own texts; `own`: only these; or a "
            "file, text or .jsonl with `text`."
        ),
    ] = "mixed"
    rows: Annotated[int, typer.Option(min=1, help="Texts.")] = 64
    length: Annotated[int, typer.Option(min=8, help="Tokens of a text.")] = 512
    seed: options.Seed = 0

    def texts(self, model: Model, recipe: Recipe) -> Calibration:
        """Return the texts; a few where no method looks at data.

        Raises:
            RequestError: a file is missing or too short.
        """
        from paceline.compress.calibrate import calibration

        if not recipe.needs_data:
            return calibration(model, count=1, length=min(self.length, 64))
        own = _own(model, self.seed)
        return calibration(model, self.calibration, self.rows, self.length, self.seed, own)


@dataclass(frozen=True)
class CardOptions:
    """Card."""

    text: Annotated[
        Path | None,
        typer.Option(help="Text that the loss is measured on; modules of Python by default."),
    ] = None
    windows: Annotated[int, typer.Option(min=2, help="Windows of it, of 512 tokens.")] = 40
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure loss and speed.")
    ] = True

    def read(self) -> tuple[str, str]:
        """Return the text and its name.

        Raises:
            RequestError: it cannot be read.
        """
        from paceline.compress.calibrate import held_out

        if self.text is None:
            return held_out(), "modules of Python's standard library"
        return read_text("the text", self.text), self.text.name


def compress(
    model: options.Model,
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    *,
    recipe: Annotated[
        str,
        typer.Option(
            help="Methods with + between them, e.g. 'awq+gptq:bits=4,group=32', or a .toml file "
            "with rules; see `paceline methods`."
        ),
    ],
    head: Annotated[
        str, typer.Option(help="Recipe of embedding and head: without data, or `keep`.")
    ] = "keep",
    calibration: CalibrationOptions,
    card: CardOptions,
    again: Annotated[
        bool, typer.Option("--again", help="Compress what is stored in few bits already.")
    ] = False,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Compress a checkpoint block by block into a new folder that runs everywhere in Paceline.

    An interrupted run goes on where it was when the same command is given again. The card in the
    folder says what was lost and gained, measured on this machine.
    """
    import torch

    from paceline.compress.card import write_card
    from paceline.compress.job import CompressionJob
    from paceline.compress.recipe import parse_recipe
    from paceline.machine import peak_bytes, usable_cores
    from paceline.measuring.price import price
    from paceline.models import load

    torch.set_num_threads(threads or usable_cores())
    plan = parse_recipe(recipe, head)
    opened = load(model)
    job = CompressionJob(opened, out, plan, again)
    text, name = card.read() if card.measure else ("", "")
    start = perf_counter()
    used: list[Calibration] = []

    def texts() -> Calibration:
        used.append(calibration.texts(opened, plan))
        return used[0]

    with counting(len(opened.config.layers), "blocks") as tick:
        size = job.run(texts, tick)
    content = _card(opened, out, plan, used[0], size, perf_counter() - start, peak_bytes())
    write_card(out, content)
    say(
        f"wrote {out}: {size.total / 1e6:.1f} MB, {size.bits_per_weight:.2f} bits for a weight of "
        f"the layers, in {content['seconds']:.0f} s"
    )
    if card.measure:
        with counting(2 * card.windows, "windows") as tick:
            content["price"] = price(opened.path, out, text, name, card.windows, threads, tick)
        write_card(out, content)
    if json:
        document(content)
    else:
        write((out / "card.md").read_text(encoding="utf-8"))


def _card(
    model: Model,
    out: Path,
    recipe: Recipe,
    texts: Calibration,
    size: Size,
    seconds: float,
    peak: int,
) -> dict[str, Any]:
    import paceline

    return {
        "name": out.name,
        "version": paceline.__version__,
        "recipe": str(recipe),
        "source": {
            "name": model.name,
            "fingerprint": model.fingerprint(),
            "bytes": model.weights.nbytes(),
        },
        "calibration": {
            "origin": texts.origin if recipe.needs_data else "not used: no method looks at data",
            "rows": len(texts.tokens),
            "length": texts.tokens.shape[1],
            "digest": texts.digest(),
        },
        "size": {
            "total": size.total,
            "matrices": size.matrices,
            "weights": size.weights,
            "bits_per_weight": size.bits_per_weight,
        },
        "seconds": seconds,
        "peak_bytes": peak,
    }


def _own(model: Model, seed: int) -> Writer:
    """Return what writes texts of the model's own."""

    def write_texts(tokens: int) -> NDArray[Any]:
        from paceline.lm import LM
        from paceline.training.self_text import selftext

        lm = LM(model.path, drafter="plain", budget=1)
        opening = lm.tokenizer.encode("")[:1]
        stops = model.defaults.stop_tokens
        total = tokens + tokens // 8  # the rest of a cut is left out
        written: NDArray[Any] = selftext(
            lm.engine, total, opening, stops, temperature=1.0, seed=seed
        ).tokens
        return written

    return write_texts
