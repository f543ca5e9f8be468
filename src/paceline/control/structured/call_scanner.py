"""Says how much of a text under way is content, whatever may follow, while tools are offered."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from paceline.control.structured.tool_calls import (
    FENCES,
    MARK,
    OPENINGS,
    PYTHON,
    THINK,
    CallReader,
    Span,
    space,
)

_STARTS = (*OPENINGS, THINK[0], "```")
_LONGEST = max(map(len, _STARTS))
_OPEN_FENCE = re.compile(r"```[ \t]*([\w-]*)(\s)?")
_CUT_PYTHON = re.compile(r"\[?\s*([A-Za-z0-9_.-]{1,64})?\Z")
_decoder = json.JSONDecoder()


class CallScanner:
    """Follows one text as it grows, so that each part of it is looked at about once.

    Args:
        functions: name -> JSON schema of the arguments.
    """

    def __init__(self, functions: Mapping[str, Any]) -> None:
        self._functions = functions
        self._settled = 0  # no call begins before, whatever follows
        self._content = 0

    def __call__(self, text: str) -> int:
        """Return how many characters of an unfinished text are content, whatever may follow.

        Args:
            text: that of the last call, and what came since.
        """
        end = _Undecided(text, self._functions).first(self._settled)
        self._settled = end.settled
        self._content = max(self._content, len(text[: end.place].rstrip()))
        return self._content


class _Undecided(CallReader):
    """Finds where the first part begins that makes a call, or may become one.

    Attributes:
        place: where it begins.
        settled: no later part changes what is before.
    """

    place = settled = 0

    def first(self, start: int) -> _Undecided:
        """Look from a place on before which everything is settled; return this."""
        text, at, stable = self.text, start, True
        self.settled, self.place = start, len(text)
        while match := MARK.search(text, at):
            found = match.start() if match[0] in OPENINGS else self.at(match)
            if isinstance(found, Span) or self._may_grow(match) or self.left < 0:
                self.place = match.start()
                break
            stable = stable and self._is_final(match)
            at = max(found, match.start() + 1)
            self.settled = at if stable else self.settled
        else:
            self.place = max(at, self.place - self._begun_mark())
        if stable:
            self.settled = max(self.settled, self._line_or_tail(self.place))
        return self

    def _begun_mark(self) -> int:
        """Return how many characters at the end may be the beginning of a mark."""
        text = self.text
        for size in range(min(len(text), _LONGEST - 1), 0, -1):
            if self._is_begun(text[-size:]):
                return size
        return 0

    @staticmethod
    def _is_begun(end: str) -> bool:
        """Return whether a text is the beginning of a mark."""
        return any(mark != end and mark.startswith(end) for mark in _STARTS)

    def _line_or_tail(self, place: int) -> int:
        """Return from where to look again: no mark that ends behind `place` begins before."""
        line = self.text.rfind("\n", 0, place) + 1
        blank = not self.text[line:place].strip()
        return line if blank else max(line, place - _LONGEST)

    def _is_final(self, match: re.Match[str]) -> bool:
        """Return whether what follows cannot change where a mark that makes no call ends."""
        mark, start = match[0], match.start()
        if mark == THINK[0]:
            return self.text.find(THINK[1], start) >= 0
        if mark == "```":
            return self.fence(start).close is not None
        line = self.text.find("\n", start)
        return mark != "`" or line >= 0 or self.text.find("`", start + 1) >= 0

    def _may_grow(self, match: re.Match[str]) -> bool:
        """Return whether more text could make a call of what begins here."""
        text, mark, start = self.text, match[0], match.start()
        last = match.end() - 1
        if len(text) - last < _LONGEST and self._is_begun(text[last:]):
            return True
        if mark == "```":
            if not self.begins_line(start):
                return False
            fence = self.fence(start)
            if fence.close is None:
                return self._fence_may_grow(start)
            # A fence of calls counts where it ends the text.
            return fence.end >= self.last and bool(self.values(text[fence.start : fence.close]))
        if mark in (THINK[0], "`"):
            return False
        if mark in OPENINGS:
            return True
        begin = match.end() - 1
        values, end = self.json_run(begin)
        if not values:
            return self._is_cut(begin) or self._python_may_grow(begin)
        if not all(self.calls_of(value) for value in values):
            return False
        return end >= self.last or self._is_cut(end)

    def _fence_may_grow(self, start: int) -> bool:
        """Return whether an open fence holds a call so far."""
        opening = _OPEN_FENCE.match(self.text, start)
        if opening is None:
            return False
        info, body = opening[1], opening[2]
        if body is None:
            return any(name.startswith(info) for name in FENCES)
        begin = space(self.text, opening.end())
        if info not in FENCES:
            return False
        rest = self.text[begin : begin + 1]
        return not rest or rest in "{[" or self._python_may_grow(begin)

    def _python_may_grow(self, start: int) -> bool:
        """Return whether calls written as Python begin here, or may."""
        match = PYTHON.match(self.text, start)
        if match:
            return match[1] == "print" or match[1] in self.functions
        match = _CUT_PYTHON.match(self.text, start)
        begun = (match[1] or "") if match else None
        return begun is not None and any(
            name.startswith(begun) for name in ("print", *self.functions)
        )

    def _is_cut(self, start: int) -> bool:
        """Return whether JSON that begins here is incomplete rather than wrong."""
        try:
            _decoder.raw_decode(self.text, start)
        except ValueError as error:
            at = getattr(error, "pos", 0)
            self.left -= at - start
            unended = "Unterminated" in str(error) or "Invalid control" in str(error)
            return unended or at >= self.last - 5
        except RecursionError:
            return False
        return False
