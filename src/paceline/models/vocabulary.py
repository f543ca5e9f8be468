"""The bytes that every token adds to a text, for controls that work token by token."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.errors import MethodError, RequestError
from paceline.models.tokenizer import Tokenizer


class Vocabulary:
    """The tokens of a model and their bytes.

    Args:
        size: number of token ids; may exceed those of the tokenizer.
        tokenizer: gives them text; None if there is none, as in tests.
        head: returns the output head [V, D], or raises.
    """

    def __init__(
        self,
        size: int,
        tokenizer: Tokenizer | None = None,
        head: Callable[[], Floats] | None = None,
    ) -> None:
        self.size = size
        self._head = head
        self._tokenizer = tokenizer
        self._containing: dict[bytes, NDArray[np.int64]] = {}

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            MethodError: there is none.
        """
        if self._tokenizer is None:
            raise MethodError("this model has no tokenizer; name tokens by their ids")
        return self._tokenizer

    @property
    def head(self) -> Floats:
        """The output head [V, D].

        Raises:
            MethodError: there is none, or logits are more than its products.
        """
        if self._head is None:
            raise MethodError("this model shows no output head; leave out what needs one")
        return self._head()

    @cached_property
    def longest(self) -> int:
        """Length of the longest token in bytes."""
        return max(len(self.tokenizer.token(index).encode()) for index in range(self.size))

    @cached_property
    def pieces(self) -> list[bytes]:
        """Bytes that each token adds inside a text, [size]; empty for special and unknown tokens.

        Raises:
            MethodError: the tokenizer's decoder is of a kind that is not known byte by byte.
        """
        decode = _MEANINGS.get(self._decoder())
        if decode is None:
            raise MethodError(
                f"the tokenizer decodes by {self._decoder()}, whose tokens have no text of their "
                "own; expected byte-level BPE or SentencePiece"
            )
        tokenizer = self.tokenizer
        named = min(self.size, len(tokenizer))
        pieces = [
            b"" if token in tokenizer.silent else decode(tokenizer.token(token))
            for token in range(named)
        ]
        return pieces + [b""] * (self.size - named)

    @cached_property
    def strips(self) -> bool:
        """Whether decoding drops the first space of a text."""
        return _strips(self.tokenizer.decoder())

    def containing(self, text: bytes) -> NDArray[np.int64]:
        """Return the ids of the tokens whose bytes contain `text`."""
        if text not in self._containing:
            tokens = [token for token, own in enumerate(self.pieces) if text in own]
            self._containing[text] = np.array(tokens, np.int64)
        return self._containing[text]

    def beginning(self, text: bytes) -> NDArray[np.int64]:
        """Return the ids of the tokens whose bytes begin with `text`."""
        return np.array([t for t in self.containing(text) if self.pieces[t].startswith(text)], int)

    def inside(self, text: bytes) -> list[int]:
        """Return token ids whose pieces, inside a text, are `text`.

        As the tokenizer divides it behind a line break, or else the longest tokens first. Ends
        before the first byte that is in no token.
        """
        with suppress(UnicodeDecodeError):
            ids = self.tokenizer.encode("\n" + text.decode(), special=False)
            for cut in range(1, min(len(ids), 4) + 1):
                if b"".join(self.pieces[t] for t in ids[:cut]).endswith(b"\n"):
                    if b"".join(self.pieces[t] for t in ids[cut:]) == text:
                        return ids[cut:]
                    break
        pieces: list[int] = []
        while text:
            sizes = range(min(len(text), self._longest), 0, -1)
            size = next((n for n in sizes if text[:n] in self._by_piece), 0)
            if not size:
                break
            pieces.append(self._by_piece[text[:size]])
            text = text[size:]
        return pieces

    @cached_property
    def _by_piece(self) -> dict[bytes, int]:
        return {piece: token for token, piece in reversed(list(enumerate(self.pieces))) if piece}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._by_piece))

    def known(self, name: str, tokens: Iterable[int]) -> NDArray[np.int64]:
        """Return `tokens` as an array; `name` is the setting they come from.

        Raises:
            RequestError: it has not.
        """
        array = np.fromiter(tokens, np.int64)
        wrong = array[(array < 0) | (array >= self.size)]
        if len(wrong):
            raise RequestError(
                f"{name} names token {wrong[0]}, which is outside the vocabulary of {self.size}"
            )
        return array

    def _decoder(self) -> str:
        return _kind(self.tokenizer.decoder())


def _kind(decoder: Any) -> str:
    """Return `ByteLevel`, `SentencePiece`, or the name of another decoder."""
    parts = decoder.get("decoders", [decoder]) if decoder else [{"type": "nothing"}]
    names = [part["type"] for part in parts]
    if names[:3] == ["Replace", "ByteFallback", "Fuse"] or names == ["Metaspace"]:
        return "SentencePiece"
    return "ByteLevel" if names == ["ByteLevel"] else "+".join(names)


def _strips(decoder: Any) -> bool:
    """Return whether a decoder drops the first space: Gemma's does not, Llama 2's does."""
    if _kind(decoder) != "SentencePiece":
        return False
    parts = decoder.get("decoders", [decoder])
    return any(
        part["type"] == "Strip" or part.get("prepend_scheme", "never") != "never" for part in parts
    )


def _characters() -> dict[str, int]:
    """Return GPT-2's printable character of each byte (Radford et al. 2019, `bytes_to_unicode`)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    pairs = [(byte, byte) for byte in shown] + [(256 + i, byte) for i, byte in enumerate(hidden)]
    return {chr(code): byte for code, byte in pairs}


_BYTES = _characters()


def _byte_level(token: str) -> bytes:
    if all(character in _BYTES for character in token):
        return bytes(_BYTES[character] for character in token)
    return token.encode()  # an added token that is written as it is


def _sentence_piece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace("\u2581", " ").encode()


_MEANINGS = {"ByteLevel": _byte_level, "SentencePiece": _sentence_piece}


def words(name: str, text: str) -> list[tuple[int, ...] | str]:
    r"""Split a list such as `13;"two words";40 41`: ids, JSON strings, runs of ids.

    In `--sampler` a comma ends the setting: write `\u002c` for one inside a string.

    Raises:
        MethodError: an item is neither.
    """
    items: list[tuple[int, ...] | str] = []
    rest = text.strip()
    while rest:
        try:
            if rest.startswith('"'):
                item, end = json.JSONDecoder().raw_decode(rest)
                items.append(item)
                rest = rest[end:].lstrip()
                if rest and not rest.startswith(";"):
                    raise ValueError
                more, rest = rest[:1], rest[1:].lstrip()
            else:
                ids, more, rest = rest.partition(";")
                items.append(tuple(_id(part) for part in ids.split()))
                rest = rest.lstrip()
            if more and not rest:
                items.append("")
        except ValueError:
            raise MethodError(
                f'{name} is {text!r}, expected token ids and "quoted text" with ; between them'
            ) from None
    if "" in items or () in items:
        raise MethodError(f"{name} has an empty item in {text!r}")
    return items


def _id(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ValueError
    return int(text)
