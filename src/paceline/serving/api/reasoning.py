"""Separates the reasoning, `<think>...</think>` at the beginning of an answer, from the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from paceline.models.tokenizer import Tokenizer

_OPEN, _CLOSE = "<think>", "</think>"
_TAIL = 12  # tokens of a prompt that may hold the tag and white space


class Separated(NamedTuple):
    """An answer's text in two parts."""

    reasoning: str
    rest: str


def reasoning_form(tokenizer: Tokenizer, prompt: Sequence[int]) -> Literal["tags", "open"]:
    """Return `open` if a prompt ends with the opening tag, as some templates do, else `tags`."""
    tail = list(prompt[-_TAIL:])
    while tail and tokenizer.token(tail[-1]) != _OPEN and not tokenizer.decode(tail[-1:]).strip():
        tail.pop()
    opened = bool(tail) and tokenizer.token(tail[-1]) == _OPEN
    return "open" if opened or tokenizer.decode(tail).endswith(_OPEN) else "tags"


def separate(text: str, form: str | None, ended: bool) -> Separated:
    """Return reasoning and rest of an answer, without white space around the reasoning.

    Args:
        text: of the answer so far.
        form: see `Job.reasoning`.
        ended: nothing follows. Until then both parts are only what is certain.
    """
    if form is None:
        return Separated("", text)
    if form == "tags":
        start = text.lstrip()
        if not start.startswith(_OPEN):
            undecided = not ended and _OPEN.startswith(start)
            return Separated("", "" if undecided else text)
        text = start[len(_OPEN) :]
    elif text.lstrip().startswith(_OPEN):  # some models repeat it
        text = text.lstrip()[len(_OPEN) :]
    elif not ended and _OPEN.startswith(text.lstrip()):
        return Separated("", "")
    reasoning, closed, rest = text.partition(_CLOSE)
    if not closed and not ended:
        held = max(size for size in range(len(_CLOSE)) if text.endswith(_CLOSE[:size]))
        reasoning = text[: len(text) - held]
    return Separated(reasoning.strip(), rest.lstrip())
