"""The program: its verbs, and the one place where errors become sentences and exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

import paceline
from paceline.cli.batch import batch
from paceline.cli.bench import bench
from paceline.cli.chat import chat
from paceline.cli.complete import complete
from paceline.cli.convert import convert
from paceline.cli.distil_hmm import distil_hmm
from paceline.cli.doctor import doctor
from paceline.cli.generate import generate
from paceline.cli.index_corpus import index_corpus
from paceline.cli.inflate import inflate
from paceline.cli.load_test import load_test
from paceline.cli.methods import methods
from paceline.cli.models import models
from paceline.cli.option_groups import Verb, either_model, spread
from paceline.cli.output import ReaderGoneError, document, drop, say, write, writing
from paceline.cli.prove import prove
from paceline.cli.pull import pull
from paceline.cli.serve import serve
from paceline.cli.tune_sampling import tune_sampling
from paceline.cli.warm import warm
from paceline.cli.watermark import watermark
from paceline.errors import PacelineError
from paceline.serving.settings import EARLIER_NAMES

# The base of typer's errors about options; which module defines it depends on typer's version.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]
_READER_GONE = 141  # as a program that SIGPIPE ended


class VerbGroup(TyperGroup):
    """Runs a verb. Errors of users exit with 2, interrupts with 130; anything else is a bug."""

    def main(self, args: Sequence[str] | None = None, *extra: Any, **more: Any) -> NoReturn:
        """Run the verb and exit with its status."""
        words = list(sys.argv[1:] if args is None else args) or ["--help"]
        more["standalone_mode"] = False
        try:
            code = super().main(words, *extra, **more)
        except _StoppedError:
            code = _stop("interrupted", 130, words)
        except ReaderGoneError:
            code = _READER_GONE
        except PacelineError as error:
            code = _stop(str(error), 2, words)
        except _UsageError as error:
            code = _stop(getattr(error, "format_message")(), 2, words)  # noqa: B009
        except MemoryError:
            code = _stop("out of memory; ask for less, or take a smaller model", 2, words)
        except OSError as error:
            where = f" {error.filename}" if error.filename else ""
            code = _stop(f"the system refused{where}: {error.strerror}", 2, words)
        try:
            write("")  # what is left
        except ReaderGoneError:
            code = code or _READER_GONE
        except PacelineError as error:
            code = code or _stop(str(error), 2, words)
        sys.exit(code if isinstance(code, int) else 0)

    def make_context(self, *words: Any, **more: Any) -> Any:
        """Parse the words before the verb; `--help` and `--version` print."""
        with _ended():
            return super().make_context(*words, **more)

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        with _ended():
            return super().invoke(ctx)


class _StoppedError(Exception):
    """Ctrl-C."""


@contextmanager
def _ended() -> Iterator[None]:
    """Raise our own exceptions for Ctrl-C and a closed pipe, before typer handles them."""
    try:
        yield
    except KeyboardInterrupt:
        raise _StoppedError from None
    except BrokenPipeError:
        with writing():
            raise
    except SystemExit as end:
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        with writing():  # the help, by rich
            raise end.__context__ from None


def _stop(message: str, code: int, words: Sequence[str]) -> int:
    say(f"paceline: {message}")
    if "--json" in words:
        try:
            document({"error": message})
        except PacelineError:
            drop(sys.stdout)
    return code


def renamed(names: Mapping[str, str]) -> Callable[[str], str]:
    """Return the function that replaces earlier names by those of today."""
    return lambda name: names.get(name, name)


app = typer.Typer(
    cls=VerbGroup,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": renamed({"load": "load-test", "index": "index-corpus"}),
    },
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"paceline {paceline.__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Faster generation from open-weight language models, with proof that nothing changed."""


PANELS: dict[str, tuple[Verb, ...]] = {
    "Generate": (generate, chat, complete),
    "Serve": (serve, batch),
    "Prepare": (pull, convert, warm, index_corpus, inflate, distil_hmm),
    "Measure": (bench, prove, load_test, tune_sampling),
    "About": (models, methods, doctor),
}
# Verbs that take the model by position as well as by --model.
EITHER_MODEL = (chat, serve, batch, warm, bench, prove, tune_sampling)
# Earlier names of options, by verb; understood for one release and left out of the help.
EARLIER: dict[Verb, dict[str, str]] = {
    serve: {old: new.replace("_", "-") for old, new in EARLIER_NAMES.items()},
    batch: {"places": "max-running"},
    tune_sampling: {"budget": "token-budget"},
}
for panel, verbs in PANELS.items():
    for verb in verbs:
        names = EARLIER.get(verb)
        command = app.command(
            rich_help_panel=panel,
            context_settings=names and {"token_normalize_func": renamed(names)},
        )
        command(either_model(spread(verb)) if verb in EITHER_MODEL else spread(verb))
app.add_typer(watermark, name="watermark", rich_help_panel="About")
