"""Names of functions and arguments in calls that a model writes as Python, which Python forbids."""

from __future__ import annotations

import re
from collections.abc import Iterable
from keyword import iskeyword, kwlist
from typing import Any


class OddNames:
    """Names that Python does not take, such as `get-weather(` and `class=`, under other names.

    Args:
        functions: whose names may be odd.
    """

    def __init__(self, functions: Iterable[str]) -> None:
        odd = [
            name
            for name in functions
            if not all(part.isidentifier() and not iskeyword(part) for part in name.split("."))
        ]
        called = "|".join(map(re.escape, sorted(odd, key=len, reverse=True)))
        given = "|".join(kwlist)
        both = rf"(?:{called})(?=\()|" if odd else ""
        self._odd = re.compile(rf"(?<![\w.-])(?:{both}(?:{given})(?=\s*=(?!=)))")
        self._names: list[str] = []
        self._mark = "\u03c0\u03b1"  # letters, so that it is a part of names

    def hide(self, text: str) -> str:
        """Return the text with other names."""
        while self._mark in text:
            self._mark += self._mark[-1]

        def other(match: re.Match[str]) -> str:
            self._names.append(match[0])
            return f"{self._mark}{len(self._names) - 1}{self._mark}"

        return self._odd.sub(other, text)

    def show(self, value: Any) -> Any:
        """Return a value with the names as they were, also within texts."""
        if isinstance(value, str):
            hidden = rf"{self._mark}([0-9]+){self._mark}"
            return re.sub(hidden, lambda match: self._names[int(match[1])], value)
        if isinstance(value, dict):
            return {self.show(key): self.show(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self.show(each) for each in value]
        return value
