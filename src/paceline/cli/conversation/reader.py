"""Where the messages of a chat come from: a terminal with line editing and history, or a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from paceline.cache_dir import cache_folder
from paceline.cli.conversation.commands import COMMANDS
from paceline.cli.output import say
from paceline.errors import RequestError

PROMPT = "> "
_HISTORY = 1000  # lines


class Reader(Protocol):
    """Reads messages.

    Attributes:
        interactive: whether somebody types.
    """

    interactive: bool

    def read(self) -> str | None:
        """Return the next message, which may be blank; None at the end.

        Raises:
            KeyboardInterrupt: the user pressed Ctrl-C.
            RequestError: the input is not text.
        """


class LineReader:
    """Reads lines of a pipe, or of a terminal that can no more."""

    def __init__(self, interactive: bool) -> None:
        self.interactive = interactive

    def read(self) -> str | None:
        """See `Reader`."""
        if self.interactive:
            sys.stderr.write(PROMPT)
            sys.stderr.flush()
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError:
            raise RequestError("the input is not UTF-8 text") from None
        return line or None


class ReadlineReader:
    """Reads lines of a terminal with Python's own readline: editing, and history if wanted."""

    interactive = True

    def __init__(self, keep: bool) -> None:
        import readline

        self._readline = readline
        self._history = history_file("chat-lines") if keep else None
        readline.set_history_length(_HISTORY)
        if self._history is not None:
            with suppress(OSError):
                readline.read_history_file(self._history)
        with suppress(Exception):  # libedit knows other settings
            readline.parse_and_bind("set enable-bracketed-paste on")

    def read(self) -> str | None:
        """See `Reader`."""
        try:
            line = input(PROMPT)
        except EOFError:
            sys.stderr.write("\n")
            return None
        except UnicodeDecodeError:
            raise RequestError("the input is not UTF-8 text") from None
        if self._history is not None and line.strip():
            with suppress(OSError):
                self._readline.write_history_file(self._history)
                self._history.chmod(0o600)
        return line


class EditingReader:
    """Reads messages of a terminal with prompt_toolkit: several lines, history, completion."""

    interactive = True

    def __init__(self, keep: bool) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

        history = history_file("chat-history") if keep else None
        keys = KeyBindings()

        @keys.add("enter")
        def _send(event: KeyPressEvent) -> None:
            event.current_buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def _new_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        words = [f"/{name}" for name in COMMANDS]
        self._session: Any = PromptSession(
            history=InMemoryHistory() if history is None else FileHistory(str(history)),
            completer=WordCompleter(words, sentence=True),
            complete_while_typing=False,
            multiline=True,
            key_bindings=keys,
            prompt_continuation="  ",
        )

    def read(self) -> str | None:
        """See `Reader`."""
        try:
            return str(self._session.prompt(PROMPT))
        except EOFError:
            return None


def reader_for(history: bool) -> Reader:
    """Return what reads the messages on standard input.

    Args:
        history: keep what is typed in the cache folder, for the arrow keys of later talks.
    """
    if not sys.stdin.isatty():
        return LineReader(interactive=False)
    able = sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
    if not able:
        return LineReader(interactive=True)
    kinds: tuple[Callable[[bool], Reader], ...] = (EditingReader, ReadlineReader)
    for kind in kinds:
        with suppress(ImportError):
            return kind(history)
    return LineReader(interactive=True)


def history_file(name: str) -> Path | None:
    """Return the file of what was typed, readable by its user only; None if none can be kept."""
    path = cache_folder() / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError as error:
        say(f"what is typed is not kept: cannot write {path}: {error.strerror}")
        return None
    return path
