"""Continues a broken stream with the answer of another replica.

The same seed gives the same text on every replica. So the request is run again from its beginning,
and what was sent already is left out: the client sees no seam. What is left out must equal what was
sent, character by character and token by token.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

_DONE = b"data: [DONE]"
_LISTS = ("tokens", "texts", "origins")  # of a trace, one entry for each token
_Some = TypeVar("_Some", str, list[str], list[int])


class SeamError(Exception):
    """The stream cannot be continued; says why."""


class ResumedStream:
    """What a client was sent of each choice, and what is new in another stream of the same request.

    Args:
        sent: the events so far, complete, each with the blank line after it.
        ago: returns the seconds since the last of them.

    Raises:
        SeamError: an event has content that cannot be compared piece by piece.
    """

    def __init__(self, sent: bytes, ago: Callable[[], float] = float) -> None:
        self._head: dict[str, Any] = {}
        self._choices: defaultdict[int, _UnmatchedChoice] = defaultdict(_UnmatchedChoice)
        self._ends: set[bytes] = set()  # events that belong to no choice
        self._at: float | None = None  # time of the last pass, on the clock of its replica
        self._ago, self._later = ago, 0.0  # by how much the other clock is behind
        for event in filter(None, sent.split(b"\n\n")):
            self._take(event)

    def _take(self, event: bytes) -> None:
        if event == _DONE:
            self._ends.add(event)
            return
        piece = _read(event)
        if not piece["choices"]:
            self._ends.add(b"usage")
        self._head = self._head or {key: piece.get(key) for key in ("id", "created")}
        trace = piece.get("paceline", {})
        self._at = trace.get("at", self._at)
        for choice in piece["choices"]:
            known = self._choices[choice["index"]]
            known.begun = True
            known.over = choice["finish_reason"] is not None
            known.text += _text(choice)
            known.tokens += _tokens(choice["logprobs"])
            known.ids += choice.get("token_ids", [])
            known.traced += trace.get("tokens", [])

    def rest(self, event: bytes) -> bytes:
        """Return an event of the other stream without what was sent; empty if nothing is left.

        Raises:
            SeamError: its text differs; or see the class.
        """
        if event == _DONE:
            return b"" if event in self._ends else event + b"\n\n"
        piece = _read(event)
        if not piece["choices"]:
            if b"usage" in self._ends:
                return b""
        else:
            piece["choices"] = [each for each in piece["choices"] if self._new(piece, each)]
            if not piece["choices"]:
                return b""
        return b"data: " + json.dumps(piece | self._head, ensure_ascii=False).encode() + b"\n\n"

    def _new(self, piece: dict[str, Any], choice: dict[str, Any]) -> bool:
        """Remove from a piece what was sent; return whether anything is left."""
        known = self._choices[choice["index"]]
        if known.over:
            return False
        text, tokens, traced = _text(choice), _tokens(choice["logprobs"]), _traced(piece)
        known.text, cut = _met(known.text, text)
        known.tokens, named = _met(known.tokens, tokens)
        known.traced, drawn = _met(known.traced, traced)
        if ids := choice.get("token_ids"):
            known.ids, seen = _met(known.ids, ids)
            choice["token_ids"] = ids[seen:]
        if choice["finish_reason"] is not None and (known.text or known.tokens or known.traced):
            raise SeamError("another replica's answer is shorter")
        if cut:
            _cut_text(choice, cut)
        if named:
            choice["logprobs"] = _cut_logprobs(choice["logprobs"], named)
        if drawn:
            _cut_trace(piece, drawn)
        if known.begun:
            choice.get("delta", {}).pop("role", None)
        if len(traced) > drawn:
            self._set_clock(piece["paceline"])
        anything = len(text) > cut or len(tokens) > named or len(traced) > drawn or not known.begun
        known.begun = True
        calls = bool(choice.get("delta", {}).get("tool_calls") or choice.get("token_ids"))
        return anything or calls or choice["finish_reason"] is not None

    def _set_clock(self, trace: dict[str, Any]) -> None:
        """Let the times of passes continue on the clock of the replica that died."""
        if self._at is not None:
            self._later, self._at = self._at + self._ago() - trace["at"], None
        trace["at"] = round(trace["at"] + self._later, 6)


@dataclass
class _UnmatchedChoice:
    """What was sent of a choice and has not been seen again in the other stream."""

    text: str = ""
    tokens: list[str] = field(default_factory=list)  # with their log probabilities
    traced: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    begun: bool = False
    over: bool = False


def _met(known: _Some, new: _Some) -> tuple[_Some, int]:
    """Return what is still unmatched, and how much of `new` was matched.

    Raises:
        SeamError: they differ.
    """
    size = min(len(known), len(new))
    if known[:size] != new[:size]:
        raise SeamError("another replica's answer differs")
    return known[size:], size


def _read(event: bytes) -> dict[str, Any]:
    try:
        piece: dict[str, Any] = json.loads(event.removeprefix(b"data: "))
        for choice in piece["choices"]:
            _text(choice), _tokens(choice.setdefault("logprobs")), choice["index"]
            list(choice.get("token_ids", ()))
            choice["finish_reason"]
        _traced(piece)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise SeamError("the rest of this stream cannot be reconstructed") from None
    return piece


def _text(choice: dict[str, Any]) -> str:
    delta = choice.get("delta")
    if delta is None:
        return choice.get("text") or ""
    return (delta.get("reasoning_content") or "") + (delta.get("content") or "")


def _tokens(logprobs: dict[str, Any] | None) -> list[str]:
    if logprobs is None:
        return []
    if "content" in logprobs:
        return [each["token"] for each in logprobs["content"]]
    return list(logprobs["tokens"])


def _traced(piece: dict[str, Any]) -> list[int]:
    return list(piece["paceline"]["tokens"]) if "paceline" in piece else []


def _cut_text(choice: dict[str, Any], cut: int) -> None:
    if "delta" in choice:
        for name in ("reasoning_content", "content"):
            if text := choice["delta"].get(name):
                choice["delta"][name] = text[cut:]
                cut -= min(cut, len(text))
    else:
        choice["text"] = choice["text"][cut:]


def _cut_logprobs(logprobs: dict[str, Sequence[Any]], cut: int) -> dict[str, Any] | None:
    left = {name: each[cut:] for name, each in logprobs.items()}
    return left if any(left.values()) else None


def _cut_trace(piece: dict[str, Any], cut: int) -> None:
    """Remove tokens that were sent; the rest then belongs to two passes merged into one."""
    trace = piece["paceline"]
    trace |= {name: trace[name][cut:] for name in _LISTS}
    if trace["tokens"]:
        trace["passes"] += 1
    else:
        del piece["paceline"]
