"""Answers on the screen: Markdown on a terminal, the plain text elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import sys
from io import StringIO
from typing import Protocol

from paceline.cli.output import write

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_BEGIN_UPDATE, _END_UPDATE = "\x1b[?2026h", "\x1b[?2026l"  # shown at once where supported


class Screen(Protocol):
    """Shows one answer as it comes."""

    def add(self, piece: str) -> None:
        """Show a piece of the answer."""

    def finish(self) -> None:
        """End the answer."""


class PlainScreen:
    """Writes the text as it is; on a terminal without control characters."""

    def __init__(self, terminal: bool = False) -> None:
        self._terminal = terminal

    def add(self, piece: str) -> None:
        """See `Screen`."""
        write(printable(piece) if self._terminal else piece)

    def finish(self) -> None:
        """See `Screen`."""
        write("\n")


class MarkdownScreen:
    """Shows the last block as it comes, and replaces it by its rendering when it is complete.

    Only the last block is ever written again, so that nothing flickers and the terminal's history
    is kept. A block that is taller than the terminal stays as it came.
    """

    def __init__(self) -> None:
        self._shown = ""  # of the last block, from the first column
        self._begun = False

    def add(self, piece: str) -> None:
        """See `Screen`."""
        piece = printable(piece)
        text = self._shown + piece if self._shown else piece.lstrip("\n")
        cut = complete_blocks(text)
        if cut:
            rest = text[cut:].lstrip("\n")
            self._replace(text[:cut], "\n" + rest)
            self._shown = rest
        else:
            write(text[len(self._shown) :])
            self._shown = text
        self._begun = self._begun or bool(text)

    def finish(self) -> None:
        """See `Screen`."""
        if self._shown.strip():
            self._replace(self._shown, "")
        elif not self._begun:
            write("\n")
        self._shown = ""

    def _replace(self, block: str, rest: str) -> None:
        """Replace what is shown of a block by its rendering, and write what follows."""
        width, height = shutil.get_terminal_size()
        up = rows(self._shown, width) - 1
        if up >= height - 1:  # its beginning has left the screen
            write(block[len(self._shown) :].rstrip("\n") + "\n" + rest)
            return
        back = "\r" + (f"\x1b[{up}A" if up else "") + "\x1b[J"
        write(f"{_BEGIN_UPDATE}{back}{render(block, width)}{rest}{_END_UPDATE}")


def printable(text: str) -> str:
    """Return text without characters that control a terminal; tabs become blanks."""
    return _CONTROL.sub("", text.replace("\t", "    "))


def rows(text: str, width: int) -> int:
    """Return how many rows a text takes that begins in the first column of a terminal."""
    from rich.cells import cell_len

    total = 0
    for line in text.split("\n"):
        column, total = 0, total + 1
        for character in line:
            size = cell_len(character)
            if column + size > width:
                column, total = 0, total + 1
            column += size
    return total


def complete_blocks(text: str) -> int:
    """Return the length of the leading blocks of Markdown that no further text can change.

    A block ends at a blank line outside of code, if the next line has begun and is not indented,
    or with the line that closes a code block.
    """
    cut = at = 0
    fence, blank = "", False
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        if fence:
            closing = line.strip()
            if closing.startswith(fence) and not closing.strip(fence[0]) and line.endswith("\n"):
                fence, cut = "", at + len(line)
        elif not line.strip():
            blank = True
        else:
            if blank and not line[0].isspace():
                cut = at
            blank = False
            if opening := _FENCE.match(line):
                fence = opening[1]
        at += len(line)
    return cut if text[:cut].strip() else 0


def render(block: str, width: int) -> str:
    """Return a block of Markdown as the terminal shows it."""
    from rich.console import Console
    from rich.markdown import Markdown

    drawn = StringIO()
    console = Console(file=drawn, force_terminal=True, width=width)
    console.print(Markdown(block.strip("\n"), code_theme="ansi_dark"))
    lines = [line.rstrip() for line in drawn.getvalue().strip("\n").split("\n")]
    return "\n".join(lines) + "\n"


def screen_for(markdown: bool) -> Screen:
    """Return what shows an answer on standard output."""
    terminal = sys.stdout.isatty()
    if markdown and terminal and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
        return MarkdownScreen()
    return PlainScreen(terminal)


def dim(line: str) -> str:
    """Return a line of stderr, faint on a terminal that may show colours."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") in ("dumb", "unknown")
    return line if plain or not sys.stderr.isatty() else f"\x1b[2m{line}\x1b[0m"
