"""SQuAD: questions about a paragraph that stands among paragraphs of other articles."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paceline.errors import RequestError
from paceline.lm import LM
from paceline.measuring.evaluation.base import Item, item_key
from paceline.measuring.evaluation.data import find_file, is_text
from paceline.measuring.evaluation.long_context import ContextSuite
from paceline.measuring.evaluation.long_tasks import LongContext, Question
from paceline.measuring.evaluation.prefix import prefix_tokens

_CONTEXTS = 40
_SHOTS = 2
_MAX_QUESTIONS = 8  # of a paragraph
_OPENERS: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of an article.

    Attributes:
        article: number of the article.
        text: of the paragraph.
        asked: questions with their first answers.
    """

    article: int
    text: str
    asked: list[tuple[str, str]]


class Squad(ContextSuite):
    """Reading comprehension with distractors, after two solved questions.

    A context holds one paragraph that is asked about, somewhere among paragraphs of other
    articles, as many as fit. The solved questions are about distractors; they stand behind the
    context, before each question. Rajpurkar et al., arXiv 1606.05250, also as XQuAD (Artetxe et
    al., arXiv 1910.11856).

    Args:
        folder: holds a JSON file in SQuAD's format.
        limit: contexts.
        length: maximum tokens of a context; by default 2048, or three quarters of what the model
            sees.
        prefix: token before a context, see `prefix_tokens`.
        seed: of distractors and their order.

    Raises:
        RequestError: the data cannot be read.
    """

    name = "squad"
    room = 384

    def __init__(
        self,
        folder: Path,
        limit: int | None = None,
        length: int | None = None,
        prefix: str = "auto",
        seed: int = 0,
    ) -> None:
        path = find_file(folder, "squad", "*squad*.json", "*.json")
        self._paragraphs = read_paragraphs(path)
        if len({paragraph.article for paragraph in self._paragraphs}) < 2:
            raise RequestError(f"{path} holds one article, expected at least two: others distract")
        super().__init__(item_key([p.text for p in self._paragraphs]), length, prefix, seed)
        order = np.random.default_rng(seed).permutation(len(self._paragraphs))
        self.items = [
            Item(int(index), item_key(int(index), self._paragraphs[index].asked, seed))
            for index in order[: limit or _CONTEXTS]
        ]

    def context(self, lm: LM, item: Item) -> LongContext:
        """See `ContextSuite.context`."""

        def encode(text: str) -> list[int]:
            return lm.tokenizer.encode(text, False)

        rng = np.random.default_rng([self._seed, item.content])
        gold, size = self._paragraphs[item.content], self._size(lm)
        chosen, tokens = [gold], prefix_tokens(lm, self._prefix)
        room = size - len(tokens) - len(encode(gold.text + "\n\n"))
        if room < 0:
            raise RequestError(
                f"a paragraph has {size - room} tokens, more than a context of {size}; give a "
                "larger --context"
            )
        others = [each for each in self._paragraphs if each.article != gold.article]
        for index in rng.permutation(len(others)):
            room -= len(encode(others[index].text + "\n\n"))
            if room < 0:
                break
            chosen.append(others[index])
        solved = [paragraph for paragraph in chosen[1:] if paragraph.asked][:_SHOTS]
        examples = "".join(_ask(*paragraph.asked[0]) + "\n\n" for paragraph in solved)
        for index in rng.permutation(len(chosen)):
            tokens = tokens + encode(chosen[index].text + "\n\n")
        questions = self._questions(encode, gold, examples)
        if not questions:
            raise RequestError(f"the questions {gold.asked[0][0]!a:.60} ... are too long")
        return LongContext(tokens, questions)

    def _questions(
        self, encode: Callable[[str], list[int]], gold: Paragraph, examples: str
    ) -> list[Question]:
        """Return the questions about a paragraph that the room is large enough for."""
        found: list[Question] = []
        for question, answer in gold.asked:
            asked, answered = encode(examples + _ask(question)), encode(f" {answer}")
            if len(asked) + len(answered) <= self.room and len(found) < _MAX_QUESTIONS:
                found.append(Question([*asked, *answered], len(answered)))
        return found


def read_paragraphs(path: Path) -> list[Paragraph]:
    """Return the paragraphs of a file in SQuAD's format that have questions with answers.

    Raises:
        RequestError: the file cannot be read or has another form.
    """
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            document = json.load(file)
    except (OSError, EOFError, lzma.LZMAError, ValueError, RecursionError):
        raise RequestError(f"{path} is no whole JSON file; fetch it again") from None
    try:
        found = list(_paragraphs(document))
    except (KeyError, TypeError, IndexError, AttributeError):
        raise RequestError(f"{path} is not in SQuAD's format: data, paragraphs, qas") from None
    if not found:
        raise RequestError(f"{path} holds no paragraph with answered questions")
    return found


def _paragraphs(document: Any) -> Iterator[Paragraph]:
    for number, article in enumerate(document["data"]):
        for paragraph in article["paragraphs"]:
            asked = [
                (each["question"], each["answers"][0]["text"])
                for each in paragraph["qas"]
                if each["answers"] and is_text(each["answers"][0]["text"])
            ]
            if is_text(paragraph["context"]) and asked and all(is_text(q) for q, _ in asked):
                yield Paragraph(number, paragraph["context"].strip(), asked)


def _ask(question: str, answer: str = "") -> str:
    asked = f"Question: {question.strip()}\nAnswer:"
    return f"{asked} {answer}" if answer else asked
