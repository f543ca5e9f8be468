"""A stream that broke off, gone on with by another replica.

The same seed gives the same text wherever it is run. So the request is run again from its
beginning, and what was told already is left out: whoever reads the stream sees no seam.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

_DONE = b"data: [DONE]"


class SeamError(Exception):
    """The stream holds what cannot be told apart piece by piece."""


class Splice:
    """What a client was told, and what is new in another stream of the same answer.

    Args:
        told: the events so far, whole, each with the blank line after it.

    Raises:
        SeamError: see there.
    """

    def __init__(self, told: bytes) -> None:
        self._head: dict[str, Any] = {}
        self._told: Counter[int] = Counter()  # characters of each choice
        self._begun: set[int] = set()
        self._over: set[int] = set()
        self._ends: set[bytes] = set()  # that belong to no choice
        for event in filter(None, told.split(b"\n\n")):
            self._take(event)

    def _take(self, event: bytes) -> None:
        if event == _DONE:
            self._ends.add(event)
            return
        piece = _read(event)
        if not piece["choices"]:
            self._ends.add(b"usage")
        self._head = self._head or {key: piece.get(key) for key in ("id", "created")}
        for choice in piece["choices"]:
            index = choice["index"]
            self._begun.add(index)
            self._told[index] += len(_text(choice))
            if choice["finish_reason"] is not None:
                self._over.add(index)

    def rest(self, event: bytes) -> bytes:
        """An event of the other stream, less what was told; nothing where nothing is left.

        Raises:
            SeamError: see there.
        """
        if event == _DONE:
            return b"" if event in self._ends else event + b"\n\n"
        piece = _read(event)
        if not piece["choices"]:
            if b"usage" in self._ends:
                return b""
        else:
            piece["choices"] = [each for each in piece["choices"] if self._new(each)]
            if not piece["choices"]:
                return b""
        return b"data: " + json.dumps(piece | self._head, ensure_ascii=False).encode() + b"\n\n"

    def _new(self, choice: dict[str, Any]) -> bool:
        """Cut from a choice what was told; whether anything is left."""
        index, text = choice["index"], _text(choice)
        if index in self._over:
            return False
        known = min(self._told[index], len(text))
        self._told[index] -= known
        if known or not text:
            begun = index in self._begun
            if "delta" in choice:
                change = {key: value for key, value in choice["delta"].items() if key != "role"}
                choice["delta"] = (change if begun else choice["delta"]) | (
                    {"content": text[known:]} if text else {}
                )
            else:
                choice["text"] = text[known:]
            news = text[known:] or choice.get("delta", {}).get("tool_calls") or not begun
            return bool(news) or choice["finish_reason"] is not None
        return True


def _read(event: bytes) -> dict[str, Any]:
    try:
        piece = json.loads(event.removeprefix(b"data: "))
        plain = all(each.get("logprobs") is None for each in piece["choices"])
    except (ValueError, LookupError, TypeError, AttributeError):
        raise SeamError from None
    if not plain or "paceline" in piece or "error" in piece:
        raise SeamError
    found: dict[str, Any] = piece
    return found


def _text(choice: dict[str, Any]) -> str:
    delta = choice.get("delta")
    return (choice.get("text") if delta is None else delta.get("content")) or ""
