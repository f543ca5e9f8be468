"""The program: its verbs, and the one place where errors become sentences and exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

import paceline
from paceline.cli.command import command_of
from paceline.cli.option_groups import either_model, model_or_prompt, spread
from paceline.cli.output import ReaderGoneError, document, drop, say, write, writing
from paceline.errors import PacelineError

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


_EARLIER_VERBS = {"load": "load-test", "index": "index-corpus"}
PANELS: dict[str, tuple[str, ...]] = {
    "Generate": ("generate", "chat", "complete"),
    "Serve": ("serve", "batch"),
    "Prepare": (
        "pull",
        "convert",
        "compress",
        "warm",
        "train-head",
        "index-corpus",
        "profile-heads",
        "inflate",
        "distil-hmm",
    ),
    "Measure": ("plan", "eval", "bench", "prove", "load-test", "tune-sampling"),
    "About": ("models", "methods", "doctor"),
}
# Verbs that take the model by position as well as by --model.
EITHER_MODEL = ("doctor", "chat", "serve", "batch", "warm", "bench", "prove", "tune-sampling")
# Verbs whose first argument is the model; --model takes its place.
MODEL_FIRST = (
    "plan",
    "convert",
    "compress",
    "eval",
    "train-head",
    "index-corpus",
    "profile-heads",
    "inflate",
    "distil-hmm",
)
# Verbs that continue a prompt, with the model before it or as --model.
MODEL_OR_PROMPT = ("generate", "complete")


def _earlier_options(verb: str) -> dict[str, str]:
    """Return earlier names of options; understood for one release and left out of the help."""
    if verb == "serve":
        from paceline.serving.settings import EARLIER_NAMES

        return {old: new.replace("_", "-") for old, new in EARLIER_NAMES.items()}
    return {"batch": {"places": "max-running"}, "tune-sampling": {"budget": "token-budget"}}.get(
        verb, {}
    )


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"paceline {paceline.__version__}")
        raise typer.Exit


def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Faster generation from open-weight language models, with proof that nothing changed."""


def _add(app: typer.Typer, panel: str, name: str) -> None:
    module = name.replace("-", "_")
    verb = getattr(import_module(f"paceline.cli.{module}"), module)
    names = _earlier_options(name)
    command = app.command(
        cls=command_of(name, MODEL_FIRST),
        rich_help_panel=panel,
        context_settings=names and {"token_normalize_func": renamed(names)},
    )
    verb = spread(verb)
    if name in EITHER_MODEL:
        verb = either_model(verb)
    elif name in MODEL_OR_PROMPT:
        verb = model_or_prompt(verb)
    command(verb)


@cache
def make_app(first_word: str | None = None) -> typer.Typer:
    """Return the program.

    Args:
        first_word: of the command line; where it is a verb, no other verb is imported.
    """
    app = typer.Typer(
        cls=VerbGroup,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={
            "help_option_names": ["-h", "--help"],
            "token_normalize_func": renamed(_EARLIER_VERBS),
        },
    )
    app.callback()(program)
    only = _EARLIER_VERBS.get(first_word, first_word) if first_word else None
    known = [(panel, name) for panel, names in PANELS.items() for name in names]
    chosen = [entry for entry in known if entry[1] == only]
    for panel, name in chosen or known:
        _add(app, panel, name)
    if not chosen:
        from paceline.cli.watermark import watermark

        app.add_typer(watermark, name="watermark", rich_help_panel="About")
    return app


def __getattr__(name: str) -> typer.Typer:
    if name == "app":  # with all verbs
        return make_app()
    raise AttributeError(f"module 'paceline.cli.app' has no attribute {name!r}")
