"""Incremental detokenisation: tokens go in one by one, whole characters come out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_HALF = "\ufffd"  # what decoders put where bytes are no character, or not yet
_LONGEST_RUN = 16  # tokens


class Decoder(Protocol):
    """The part of a tokenizer that the detokenizer uses."""

    silent: frozenset[int]
    byte_tokens: frozenset[int]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`."""
        ...

    def with_special(self) -> Decoder:
        """Return a decoder to whose texts special tokens contribute what they are called."""
        ...


class Detokenizer:
    """Turns a stream of tokens into text: what `push` and `flush` return, joined, is all of it.

    The text of a token depends on its neighbours: the first space of a text is dropped, and bytes
    are joined to characters. So each token is decoded together with the last tokens that produced
    text, and only the added text is returned. The window is short: the time per token is constant.

    If the text continues `before`, its first space is kept.

    Text is held back while it ends inside a character, and while byte tokens follow one another,
    since one invalid byte spoils its neighbours; at most for 16 tokens, plus those that complete a
    character.

    Args:
        tokenizer: decodes.
        before: tokens of the text that is continued; empty at the start of a text.
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
        """Return the text that `token` completes; may be empty."""
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
        """Return the text that is still held back."""
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
