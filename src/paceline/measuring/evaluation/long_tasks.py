"""Questions about long contexts: needles, keys and repeated passages, hidden in a book's text.

Contexts and questions are built of token ids, so that a context has exactly the length that is
asked for, and all questions of a context begin with one token, behind which they share one prefill.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from paceline.errors import RequestError

Encode = Callable[[str], list[int]]

_SENTENCE = re.compile(r"[^.!?]*[.!?]+[\"'”’)]*\s*|[^.!?]+$")
_NAMES = (
    "Arnold", "Bertha", "Clement", "Dorothy", "Edmund", "Florence", "Gilbert", "Harriet",
    "Isidore", "Josephine", "Kenneth", "Lavinia", "Mortimer", "Nathaniel", "Octavia", "Percival",
)  # fmt: skip
_SECRETS = (
    "The access code of {} is",
    "The ticket number of {} is",
    "The telephone number of {} is",
    "The locker number of {} is",
)
_COLOURS = ("red", "blue", "green", "black", "white", "yellow", "brown", "orange")
_COPIES = 5  # passages of a context that are repeated
_SHOWN, _SCORED = 20, 16  # tokens of a passage that is repeated
_NEAR = 192  # last tokens of a context, in which nothing is hidden
_EDGES = (0.03, 0.97)  # depths of the first and last needle


@dataclass(frozen=True)
class Question:
    """A question and its answer, in tokens.

    Attributes:
        tokens: question and answer; the first is the same for all questions.
        answer: how many tokens at the end are the answer.
    """

    tokens: list[int]
    answer: int


@dataclass(frozen=True)
class LongContext:
    """A context and what is asked about it."""

    tokens: list[int]
    questions: list[Question]


class ContextBuilder:
    """Builds contexts of a length out of a text.

    Args:
        encode: text to token ids, without special tokens.
        start: tokens before each context.
        length: tokens of a context, `start` among them.

    Raises:
        RequestError: the length leaves no room for anything hidden.
    """

    def __init__(self, encode: Encode, start: Sequence[int], length: int) -> None:
        if length < 2 * _NEAR:
            raise RequestError(
                f"a context of {length} tokens is too short for the suite long, expected "
                f"{2 * _NEAR} at least; give --context or a model that sees more"
            )
        self._encode, self._start, self._length = encode, list(start), length
        self._mark = encode("\n\n")[:1] or encode("\n")[:1] or encode(" ")[:1]

    def single(self, text: str, rng: np.random.Generator) -> LongContext:
        """Hide four numbers of five digits, each in a sentence of its own kind."""
        names = rng.choice(_NAMES, len(_SECRETS), replace=False)
        numbers = rng.integers(10_000, 100_000, len(_SECRETS))
        facts = [
            (secret.format(name), f" {number}")
            for secret, name, number in zip(_SECRETS, names, numbers, strict=True)
        ]
        return self._hidden(text, facts, rng)

    def multikey(self, text: str, rng: np.random.Generator) -> LongContext:
        """Hide eight sentences of one kind; each answer is a word."""
        names = rng.choice(_NAMES, len(_COLOURS), replace=False)
        colours = rng.permutation(_COLOURS)
        facts = [
            (f"The favourite colour of {name} is", f" {colour}")
            for name, colour in zip(names, colours, strict=True)
        ]
        return self._hidden(text, facts, rng)

    def copy(self, text: str, rng: np.random.Generator) -> LongContext:
        """Repeat the beginnings of earlier passages; the answers are what followed there."""
        tokens = self._filled(text, [])
        last = len(tokens) - _NEAR - _SHOWN - _SCORED
        first = len(self._start) + 1
        starts = first + ((last - first) * self._depths(_COPIES, rng)).astype(int)
        questions = [
            Question([*self._mark, *tokens[at : at + _SHOWN + _SCORED]], _SCORED) for at in starts
        ]
        return LongContext(tokens, questions)

    def story(
        self,
        text: str,
        facts: Sequence[str],
        asked: Sequence[tuple[str, str, str]],
        rng: np.random.Generator,
    ) -> LongContext:
        """Hide sentences in their order.

        Args:
            text: that hides them.
            facts: the sentences.
            asked: question, beginning of the answer, which may be empty, and the word it ends with.
            rng: draws the depths.
        """
        depths = self._depths(len(facts), rng)
        needles = [
            (depth, self._encode(f" {fact}")) for depth, fact in zip(depths, facts, strict=True)
        ]
        questions = []
        for what, lead, word in asked:
            question = self._encode(f"Question: {what}\nAnswer: {lead}".rstrip())
            answer = self._encode(f" {word}")
            questions.append(Question([*self._mark, *question, *answer], len(answer)))
        return LongContext(self._filled(text, needles), questions)

    def _hidden(
        self, text: str, facts: list[tuple[str, str]], rng: np.random.Generator
    ) -> LongContext:
        order = rng.permutation(len(facts))
        depths = self._depths(len(facts), rng)
        needles = [
            (depth, self._encode(f" {claim}{value}."))
            for depth, (claim, value) in zip(depths, (facts[i] for i in order), strict=True)
        ]
        questions = []
        for claim, value in facts:
            asked = claim[0].lower() + claim[1:]
            what = asked.removesuffix(" is")
            question = self._encode(f"Question: What is {what}?\nAnswer: {claim}")
            answer = self._encode(value)
            questions.append(Question([*self._mark, *question, *answer], len(answer)))
        return LongContext(self._filled(text, needles), questions)

    def _depths(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Return depths, one in each of `count` equal parts, increasing."""
        low, high = _EDGES
        parts = (np.arange(count) + rng.random(count)) / count
        return low + (high - low) * parts

    def _filled(self, text: str, needles: Sequence[tuple[float, list[int]]]) -> list[int]:
        """Return a context: whole sentences, needles behind them, and the last one cut.

        Where a sentence leads into the end, where nothing is hidden, needles interrupt it.

        Raises:
            RequestError: the text is too short, or the needles are too long for the context.
        """
        tokens, waiting = list(self._start), list(needles)
        room = self._length - _NEAR
        for sentence in _sentences(text):
            rest = self._encode(sentence)
            while rest:
                while waiting and len(tokens) >= waiting[0][0] * room:
                    tokens += waiting.pop(0)[1]
                if len(tokens) > self._length:
                    raise RequestError(
                        f"a context of {self._length} tokens is too short for what is hidden in "
                        "it; give a larger --context or a model that sees more"
                    )
                end = room - len(tokens) if waiting else len(rest)
                tokens, rest = tokens + rest[:end], rest[end:]
                if len(tokens) >= self._length and not waiting:
                    return tokens[: self._length]
        raise RequestError(
            f"a text has {len(tokens)} tokens, too few for a context of {self._length}"
        )


def _sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a text; spaces belong to the one that they lead to."""
    lead = ""
    for match in _SENTENCE.finditer(text):
        part = match.group()
        body = part.rstrip()
        if lead + body:
            yield lead + body
        lead = part[len(body) :]
