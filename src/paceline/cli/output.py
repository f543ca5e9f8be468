"""Writing: text and one JSON document to stdout, everything else to stderr, files as a whole."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from paceline.errors import PacelineError

if TYPE_CHECKING:
    from rich.console import RenderableType

_WIDTH = 120  # of tables that go to a file or a pipe


def write(text: str) -> None:
    """Write text to stdout and flush it.

    Raises:
        PacelineError: the disk is full or the reader is gone.
    """
    with writing():
        try:
            sys.stdout.write(text)
        except UnicodeEncodeError:
            encoding = sys.stdout.encoding or "ascii"
            sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()


class ReaderGoneError(PacelineError):
    """The reader of standard output ended, as `head` does; the program ends without a message."""


@contextmanager
def writing() -> Iterator[None]:
    """Turn errors of writing to stdout into one sentence.

    Raises:
        ReaderGoneError: the reader is gone.
        PacelineError: the disk is full, or stdout is closed.
    """
    try:
        yield
    except BrokenPipeError:
        drop(sys.stdout)
        raise ReaderGoneError("nobody reads standard output any more") from None
    except OSError as error:
        drop(sys.stdout)
        raise PacelineError(f"cannot write to standard output: {error.strerror}") from None


def drop(stream: TextIO) -> None:
    """Redirect a broken stream to nowhere, so that Python does not flush it again at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def document(content: dict[str, Any]) -> None:
    """Print the JSON document of a verb."""
    write(json.dumps(content, indent=2, allow_nan=False) + "\n")


def say(line: str) -> None:
    """Print a line to stderr, ignoring that nobody may read it."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        drop(sys.stderr)


def show(content: RenderableType, stdout: bool = True) -> None:
    """Print a table to stdout or stderr."""
    from rich.console import Console

    terminal = Console(stderr=not stdout)
    drawn = StringIO()  # not the stream itself, where rich would have its own way with errors
    width = terminal.width if terminal.is_terminal else _WIDTH
    Console(file=drawn, force_terminal=terminal.is_terminal, width=width).print(content)
    if stdout:
        write(drawn.getvalue())
    else:
        say(drawn.getvalue().rstrip("\n"))


def check_target(path: Path | None) -> None:
    """Refuse a path that cannot be written, before the work begins.

    Raises:
        PacelineError: its folder is missing, or it is something other than a file.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        raise PacelineError(f"cannot write {path}: there is no folder {path.parent}")
    if path.exists() and not path.is_file():
        raise PacelineError(f"cannot write {path}: it is not a file")
    if not os.access(path.parent, os.W_OK):
        raise PacelineError(f"cannot write {path}: the folder may not be written to")


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a document; see `save_text`."""
    save_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def save_text(path: Path, text: str) -> None:
    """Write a file as a whole: under another name first, so that no half file is left.

    Raises:
        PacelineError: the system refused.
    """
    check_target(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise PacelineError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with suppress(OSError):
            draft.unlink()
