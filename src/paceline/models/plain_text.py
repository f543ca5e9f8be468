"""Encode text in which special tokens are text: what users write cannot end their turn.

As in transformers, a tokenizer finds special tokens wherever their text stands, also in what a user
wrote. Where that is not wanted, the text is split: special tokens that the chat template wrote stay
tokens, those in the messages become the tokens of their letters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import count, groupby
from typing import Any

import tokenizers

from paceline.models.sentence_piece import SentencePieceBackend

Backend = tokenizers.Tokenizer | SentencePieceBackend
Encode = Callable[[str], list[int]]

_WRITTEN = ("user", "tool", "function", "system", "developer")  # roles whose text is others'
_PRIVATE = 0xF0000  # code points that no text means anything by


def without_special(backend: Backend) -> Backend:
    """Return a copy of a tokenizer that finds no special tokens in a text."""
    if isinstance(backend, SentencePieceBackend):
        return backend.without_special()
    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    copy.encode_special_tokens = True
    return copy


class MarkedMessages:
    """Chat messages in which special tokens are replaced by marks that no template changes.

    Args:
        messages: as chat templates take them.
        special: texts of the special tokens.

    Attributes:
        messages: with marks in all texts of users, tools and systems.
    """

    def __init__(self, messages: Sequence[Mapping[str, Any]], special: Sequence[str]) -> None:
        self._special = _any_of(special)
        self._marks: dict[str, str] = {}  # text -> mark
        used = set(_texts(list(messages)))
        self._free = (
            mark for mark in map(chr, count(_PRIVATE)) if not any(mark in text for text in used)
        )
        self.messages = [
            self._marked(message) if message.get("role") in _WRITTEN else message
            for message in messages
        ]

    def encode(self, text: str, with_special: Encode, plain: Encode) -> list[int]:
        """Return the tokens of a rendered conversation.

        Args:
            text: with marks.
            with_special: encodes text in which special tokens are found.
            plain: encodes text in which they are not.
        """
        if not self._marks:
            return with_special(text)
        originals = {mark: token for token, mark in self._marks.items()}
        marked = re.compile(f"[{''.join(originals)}]")
        parts = [part for part in re.split(f"({self._special.pattern})", text) if part]
        ids: list[int] = []
        for has_marks, group in groupby(parts, lambda part: bool(marked.search(part))):
            joined = "".join(group)
            if has_marks:
                ids += plain(marked.sub(lambda found: originals[found.group()], joined))
            else:
                ids += with_special(joined)
        return ids

    def _marked(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._special.sub(lambda found: self._mark(found.group()), value)
        if isinstance(value, Mapping):
            return {
                key: each if key == "role" else self._marked(each) for key, each in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._marked(each) for each in value]
        return value

    def _mark(self, token: str) -> str:
        if token not in self._marks:
            self._marks[token] = next(self._free)
        return self._marks[token]


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted((text for text in texts if text), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for each in value.values() for text in _texts(each)]
    if isinstance(value, list | tuple):
        return [text for each in value for text in _texts(each)]
    return []
