"""Streaming text: tokens come one by one, whole characters go out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_HALF = "\ufffd"  # what decoders put where bytes are no character, or not yet
_LONGEST_RUN = 16  # tokens


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    silent: frozenset[int]
    byte_tokens: frozenset[int]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`."""
        ...


class Detokenizer:
    """The pieces that `push` and `flush` return, joined, are the decoded text of all tokens.

    A token's text depends on its neighbours: a space before the first one is dropped, bytes are
    joined to characters. So a token is decoded behind the last ones that gave text, and what is
    new is what that adds. Only this short window is kept: the time for a token does not grow.

    Behind a text that goes on, `before`, the first space is kept.

    Text is held back while it ends in half a character, and while bytes follow one another as
    tokens of their own, since one invalid byte spoils all those around it; no longer than 16
    tokens, or the few more that complete a character.

    Args:
        tokenizer: decodes.
        before: tokens of the text that goes on; empty where one begins.
    """

    def __init__(self, tokenizer: Decoder, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        heard = [token for token in before if token not in tokenizer.silent]
        start = max(len(heard) - _LONGEST_RUN, 0)
        while start and heard[start] in tokenizer.byte_tokens:  # a run of bytes is read as one
            start -= 1
        self._window = heard[start:]
        self._read = len(self._window)  # tokens of the window whose text went out
        self._shown: int | None = None  # characters of that text, decoded by itself

    def push(self, token: int) -> str:
        """Text that `token` completes; may be empty."""
        if token in self._tokenizer.silent:
            return ""
        self._window.append(token)
        held = len(self._window) - self._read
        if token in self._tokenizer.byte_tokens and held < _LONGEST_RUN:
            return ""
        text = self._tokenizer.decode(self._window)
        if text.endswith(_HALF) and held < _LONGEST_RUN + 4:
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """Text still held back."""
        held = len(self._window) > self._read
        return self._advance(self._tokenizer.decode(self._window)) if held else ""

    def _advance(self, text: str) -> str:
        if self._shown is None:  # a character that is not whole yet will be shown
            self._shown = len(self._tokenizer.decode(self._window[: self._read]).rstrip(_HALF))
        new = text[self._shown :]
        if new:
            self._window = self._window[self._read :]
            self._read = len(self._window)
            self._shown = len(self._tokenizer.decode(self._window))
        return new
