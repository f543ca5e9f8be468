"""Bad words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paceline.control.base import ControlMethod
from paceline.control.logits import forbid
from paceline.core import Control, Exactness, Floats, Request
from paceline.errors import MethodError
from paceline.models.vocabulary import Vocabulary, words
from paceline.registry import Source, controls


@controls.register("bad_words", Exactness.EXACT)
@dataclass(frozen=True)
class BadWords(ControlMethod):
    r"""Forbid words anywhere in the output.

    Texts are compared byte by byte, so that no tokenisation of one can occur, nor one that begins
    at the end of the prompt. Token ids forbid exactly that sequence of tokens.

    Attributes:
        words: quoted texts, token ids and runs of ids, `;` between them, as in `"damn";13;40 41`;
            in `--sampler` a comma inside a text is written `\u002c`.
    """

    words: str

    order = 31
    examples = ('bad_words:words=" the";"m";410 411',)
    source = Source(note="ours for texts; for ids as in Hugging Face transformers, bad_words_ids")

    def __post_init__(self) -> None:
        for item in words("bad_words", self.words):
            if isinstance(item, str) and item != item.encode(errors="replace").decode():
                raise MethodError("a bad word holds half a character (a lone surrogate)")

    def bind(self, request: Request, vocabulary: Vocabulary) -> Control:
        """Look up the tokens that could complete a word."""
        items = words("bad_words", self.words)
        runs = [item for item in items if not isinstance(item, str)]
        for run in runs:
            vocabulary.known("bad_words", run)
        texts = [item.encode() for item in items if isinstance(item, str)]
        return _BadWords(runs, [_BadWord(text, vocabulary) for text in texts], vocabulary)


class _BadWord:
    """One word, and for each prefix that the output may end with, the tokens that complete it."""

    def __init__(self, text: bytes, vocabulary: Vocabulary) -> None:
        self.text = text
        self.always = vocabulary.containing(text)
        self.after = [self.always] + [
            vocabulary.beginning(text[size:]) for size in range(1, len(text))
        ]

    def forbidden(self, tail: bytes) -> list[NDArray[np.int64]]:
        ends = [n for n in range(1, len(self.text)) if tail.endswith(self.text[:n])]
        return [self.always, *(self.after[n] for n in ends)]


class _BadWords:
    def __init__(
        self, runs: list[tuple[int, ...]], texts: list[_BadWord], vocabulary: Vocabulary
    ) -> None:
        self._runs, self._texts, self._vocabulary = runs, texts, vocabulary
        self._need = max((len(text.text) for text in texts), default=1) - 1

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        edited = logits
        for *before, last in self._runs:
            if not before or history[-len(before) :] == before:
                edited = forbid(edited, last)
        if self._texts:
            tail = self._tail(history)
            forbidden_tokens = [part for text in self._texts for part in text.forbidden(tail)]
            edited = forbid(edited, np.concatenate(forbidden_tokens))
        return edited

    def _tail(self, history: list[int]) -> bytes:
        tail = b""
        for token in reversed(history):
            if len(tail) >= self._need:
                break
            tail = self._vocabulary.pieces[token] + tail
        return tail
