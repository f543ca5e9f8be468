"""`paceline compress`: make a checkpoint smaller, and measure what that costs and brings."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from paceline.cli import options
from paceline.cli.budget import budget_search
from paceline.cli.files import read_text
from paceline.cli.output import document, say, write
from paceline.cli.progress import counting
from paceline.errors import RequestError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from paceline.compress.budget.search import BudgetSearch
    from paceline.compress.calibrate import Calibration, Writer
    from paceline.compress.checkpoint import Size
    from paceline.compress.job import CompressionJob
    from paceline.compress.recipe import Recipe
    from paceline.measuring.evaluation.base import Suite
    from paceline.measuring.quality import Windows
    from paceline.models import Model
    from paceline.planning.recipe_search import RecipeSearch


@dataclass(frozen=True)
class CalibrationOptions:
    """Calibration."""

    calibration: Annotated[
        str | None,
        typer.Option(
            help="`mixed`: documentation, code and the model's own texts; `own`: only these; or a "
            "file, text or .jsonl with `text`. Mixed by default, own for tuners of whole models."
        ),
    ] = None
    rows: Annotated[int, typer.Option(min=1, help="Texts.")] = 64
    length: Annotated[int, typer.Option(min=8, help="Tokens of a text.")] = 512
    seed: options.Seed = 0

    def texts(self, model: Model, recipe: Recipe) -> Calibration:
        """Return the texts; a few where no method looks at data.

        Raises:
            RequestError: a file is missing or too short, or options of texts are given where no
                method looks at any.
        """
        from paceline.compress.calibrate import DEFAULT, OWN, calibration

        if not recipe.needs_data and self != CalibrationOptions():
            raise RequestError(
                f"no method of {recipe} looks at texts; leave --calibration, --rows, --length and "
                "--seed out"
            )
        if not recipe.needs_data:
            return calibration(model, count=1, length=min(self.length, 64))
        own = own_writer(model, self.seed)
        source = self.calibration or (OWN if recipe.own_texts else DEFAULT)
        return calibration(model, source, self.rows, self.length, self.seed, own)

    def texts_of_search(self, model: Model) -> Calibration:
        """Return the texts of a search for levels, which always looks at them.

        Raises:
            RequestError: a file is missing or too short.
        """
        from paceline.compress.calibrate import DEFAULT, calibration

        own = own_writer(model, self.seed)
        source = self.calibration or DEFAULT
        return calibration(model, source, self.rows, self.length, self.seed, own)

    def texts_where_needed(self, model: Model, recipe: Recipe) -> Calibration:
        """Return the texts; a few by default where no method looks at data, as one of several."""
        options = self if recipe.needs_data else CalibrationOptions()
        return options.texts(model, recipe)


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
    suite: Annotated[
        list[str],
        typer.Option(help="blimp or lambada, for source and result; repeatable. Needs --data."),
    ] = field(default_factory=list)
    data: Annotated[
        Path | None, typer.Option(help="Folder of the suites' data, as of `paceline eval`.")
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Only the first items of a suite; of each paradigm for blimp."),
    ] = None
    prefix: Annotated[
        str | None,
        typer.Option(help="Token before texts of the suites, as of `paceline eval`."),
    ] = None

    @property
    def text_name(self) -> str:
        """Name of the text."""
        return "modules of Python's standard library" if self.text is None else self.text.name

    def read(self, model: Model) -> Windows:
        """Return the windows of the text for a model.

        Raises:
            RequestError: it cannot be read, or is too short.
        """
        from paceline.compress.calibrate import held_out
        from paceline.measuring.quality import WINDOW, text_windows

        text = held_out() if self.text is None else read_text("the text", self.text)
        size = min(WINDOW, model.config.context)
        return text_windows(model.tokenizer, text, size, self.windows)

    def suites(self) -> list[Suite]:
        """Return the suites with their items.

        Raises:
            RequestError: one is not scored here, or its data cannot be read.
        """
        if not self.suite and (self.data, self.limit, self.prefix) == (None, None, None):
            return []
        from paceline.measuring.evaluation.plan import SuiteSettings

        if not self.suite:
            raise RequestError("--data, --limit and --prefix are of --suite, which is not given")
        for name in self.suite:
            if name not in ("blimp", "lambada"):
                raise RequestError(
                    f"a card takes the suites blimp and lambada, not {name!a:.80}; use `paceline "
                    "eval` for others"
                )
        if not self.measure:
            raise RequestError("--no-measure leaves out what --suite measures; give one of them")
        settings = SuiteSettings(
            suite=self.suite, data=self.data, limit=self.limit, prefix=self.prefix
        )
        settings.check()
        return [settings.make(name) for name in dict.fromkeys(self.suite)]


def compress(
    model: options.Model,
    out: Annotated[
        Path, typer.Argument(help="A new folder, or a file for llama.cpp that ends in .gguf.")
    ],
    *,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Methods with + between them, e.g. 'awq+gptq:bits=4,group=32', or a .toml file "
            "with rules; see `paceline methods`."
        ),
    ] = None,
    target_loss: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Try recipes of 4 bits and more, or the levels of --recipe (shares of zeros, or "
            "bits), the smallest first, until one loses at most so many nats a token on the text.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Give every matrix a level of the recipe of its own, so that the checkpoint takes "
            "at most so many bytes and loses little: bytes=60MB; or attention and MLP of every "
            "layer, by their times on this machine: tokens/s=1.5x or tokens/s=90. Levels are "
            "shares of zeros, or bits; recipes with | between them are all tried, and narrow, "
            "attention_drop and layer_drop among them say what may become of shapes. What is found "
            "is then trained and transformed by recover, awq and others in the recipe."
        ),
    ] = None,
    allocate: Annotated[
        str, typer.Option(help="How --budget searches; see `paceline methods`.")
    ] = "evopress",
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

    A GGUF file takes recipes whose matrices it has types for, e.g. gguf:type=q4_k or
    gptq:bits=4,group=32. An interrupted run goes on where it was when the same command is given
    again. The card in the folder says what was lost and gained, measured on this machine.
    """
    import torch

    from paceline.cache_dir import cache_folder
    from paceline.compress.budget.level_recipes import level_recipes
    from paceline.compress.card import card_path, describe, write_card
    from paceline.compress.gguf_job import GGUFJob
    from paceline.compress.job import CompressionJob
    from paceline.compress.recipe import parse_recipe
    from paceline.machine import peak_bytes, usable_cores
    from paceline.measuring.price import price
    from paceline.models import load
    from paceline.planning.recipe_search import RECIPES, RecipeSearch

    torch.set_num_threads(threads or usable_cores())
    _check_searches(out, recipe, target_loss, budget, allocate)
    opened = load(model)
    suites = card.suites()
    start = perf_counter()
    windows = card.read(opened) if card.measure else None
    if target_loss is not None:
        if windows is None or out.suffix == ".gguf":
            raise RequestError(
                "--target-loss measures what it writes: leave --no-measure out, and name a folder"
            )
        tried = RECIPES if recipe is None else tuple(map(str, level_recipes(recipe)))
        search = RecipeSearch(opened, out, target_loss, windows, head, again, threads, tried)
        made = _search_loss(search, calibration)
    elif budget is not None:
        assert recipe is not None  # `_check_searches` refuses it
        searched = budget_search(opened, out, recipe, head, again, budget, allocate, threads)
        made = _search_levels(searched, calibration.texts_of_search(opened))
    else:
        assert recipe is not None
        plan = parse_recipe(recipe, head)
        job = (GGUFJob if out.suffix == ".gguf" else CompressionJob)(opened, out, plan, again)
        made = _run(job, calibration.texts(opened, plan))
    content = describe(made.job, made.texts, made.size, perf_counter() - start, peak_bytes())
    content["notes"] = [*content["notes"], *made.notes]
    write_card(out, content)
    say(
        f"wrote {out}: {made.size.total / 1e6:.1f} MB, {made.size.bits_per_weight:.2f} bits for a "
        f"weight of the layers, in {content['seconds']:.0f} s"
    )
    if windows is not None:
        items = len(windows.tokens) + sum(len(suite.items) for suite in suites)
        kept = cache_folder() / "evaluations"
        with counting(2 * items, "windows and items" if suites else "windows") as tick:
            measured = price(opened.path, out, windows, card.text_name, threads, tick, suites, kept)
        content["price"] = measured
        write_card(out, content)
    if json:
        document(content)
    else:
        write(card_path(out).read_text(encoding="utf-8"))


class _Made(NamedTuple):
    """What was written.

    Attributes:
        job: that wrote it.
        texts: of calibration.
        size: of what was written.
        notes: sentences for the card.
    """

    job: CompressionJob
    texts: Calibration
    size: Size
    notes: tuple[str, ...] = ()


def _run(job: CompressionJob, texts: Calibration, notes: tuple[str, ...] = ()) -> _Made:
    """Compress with one recipe."""
    with counting(len(job.model.config.layers), "blocks") as tick:
        return _Made(job, texts, job.run(texts, tick), notes)


def _search_loss(search: RecipeSearch, calibration: CalibrationOptions) -> _Made:
    """Compress with one recipe after another until one loses little."""
    layers = len(search.model.config.layers) * len(search.recipes)
    with counting(layers, "blocks") as tick:
        job, texts, size, trials = search.run(
            partial(calibration.texts_where_needed, search.model), tick
        )
    notes = tuple(f"Tried `{name}`: {lost:.4f} nats a token lost." for name, lost in trials)
    return _Made(job, texts, size, notes)


def _search_levels(search: BudgetSearch, texts: Calibration) -> _Made:
    """Search a level for each matrix, and compress with them."""
    from paceline.compress.job import CompressionJob
    from paceline.models.formats.writer import write_bytes

    with counting(search.steps, "blocks and evaluations") as tick:
        found = search.find(texts, tick)
    job = CompressionJob(search.model, search.out, found.recipe, search.again)
    made = _run(job, texts, (found.note,))
    write_bytes(search.out / "recipe.toml", found.toml.encode())
    search.finish()
    return made


def _check_searches(
    out: Path, recipe: str | None, target_loss: float | None, budget: str | None, allocate: str
) -> None:
    """Refuse options that do not say what is searched.

    Raises:
        RequestError: names the options.
    """
    if recipe is None and target_loss is None:
        raise RequestError("give --recipe, or --target-loss to have one searched")
    if budget is not None and (recipe is None or target_loss is not None or out.suffix == ".gguf"):
        raise RequestError(
            "--budget needs --recipe, whose levels it mixes, and a folder to write, and searches "
            "the least loss itself; leave --target-loss out"
        )
    if budget is None and allocate != "evopress":
        raise RequestError("--allocate is of --budget, which is not given; leave it out")


def own_writer(model: Model, seed: int = 0) -> Writer:
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
