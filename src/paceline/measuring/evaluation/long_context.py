"""Long contexts: what a model finds in them, and what a KV policy leaves of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from paceline.engines.base import Engine
from paceline.errors import RequestError
from paceline.kvcache.base import Policy
from paceline.lm import LM
from paceline.measuring.evaluation.base import Item, Kind, Metric, Result, Suite, item_key
from paceline.measuring.evaluation.data import find_file, is_text, read_rows
from paceline.measuring.evaluation.forest import (
    Branches,
    BranchScore,
    score_branches,
    score_decoded,
)
from paceline.measuring.evaluation.long_tasks import ContextBuilder, LongContext
from paceline.measuring.evaluation.prefix import prefix_name, prefix_tokens

KINDS = ("single", "multikey", "copy")
_CONTEXTS = 20  # of each kind
_LENGTH = 2048  # tokens of a context
_CHARACTERS = 16  # of a text for each token, so that no tokenizer runs short
_SMALLEST_BOOK = 20_000  # characters


class ContextSuite(Suite):
    """Questions about long contexts, and what a KV policy leaves of what they tell.

    No question is seen before its context ends, all questions of a context share one prefill, and
    what is scored are the tokens of the answers. A KV policy acts while the context is read; an
    attention pattern that reads few positions does so behind it. The gain of a context is the
    log-probability of the answers behind it less that of the same answers without it; `gain kept`
    is the gain under policy or pattern, over the gain with all rows read (1 without either, and
    with a pattern that is a mask). Items of standard errors are contexts. A suite
    writes `context`.

    Attributes:
        room: tokens kept free behind a context, for its questions.
    """

    metrics = (
        Metric("nats an answer token", Kind.RATIO, "nats", "tokens"),
        Metric("exact answers", Kind.RATIO, "exact", "questions"),
        Metric("gain kept", Kind.RATIO, "gain", "whole_gain"),
    )
    batch = 1
    room: ClassVar[int]

    def __init__(self, data: str, length: int | None, prefix: str, seed: int) -> None:
        self._data, self._length, self._prefix, self._seed = data, length, prefix, seed

    @abstractmethod
    def context(self, lm: LM, item: Item) -> LongContext:
        """Return the context of an item with its questions."""

    def settings(self, lm: LM) -> dict[str, Any]:
        """Return length, policy, prefix, seed and a hash of the data.

        Raises:
            RequestError: the model does not see as many tokens.
        """
        policy = lm.request_builder.kv_policy
        return {
            "context": self._size(lm),
            "kv_policy": policy and {"name": policy.name, **asdict(policy)},
            "prefix": prefix_name(lm, self._prefix),
            "seed": self._seed,
            "data": self._data,
        }

    def score(self, lm: LM, items: Sequence[Item]) -> list[Result]:
        """Return sums over the questions of each context."""
        return [self._score(lm, self.context(lm, item)) for item in items]

    def _score(self, lm: LM, context: LongContext) -> Result:
        policy = lm.request_builder.kv_policy
        start = prefix_tokens(lm, self._prefix)
        ours = score_answers(lm.engine, context.tokens, context, policy)
        whole = ours
        if policy is not None or lm.engine.pattern is not None:
            whole = score_answers(lm.engine, context.tokens, context, None, dense=True)
        none = score_answers(lm.engine, start, context, None, dense=True)
        logprob, full, without = (
            sum(each.logprob for each in scores) for scores in (ours, whole, none)
        )
        return {
            "nats": -logprob,
            "tokens": sum(question.answer for question in context.questions),
            "exact": sum(each.greedy for each in ours),
            "questions": len(context.questions),
            "gain": logprob - without,
            "whole_gain": full - without,
        }

    def _size(self, lm: LM) -> int:
        """Return the tokens of a context."""
        seen = lm.engine.config.context
        if self._length is None:
            return min(_LENGTH, seen * 3 // 4 // 64 * 64)
        if self._length + self.room > seen:
            raise RequestError(
                f"--context is {self._length}, and with {self.room} tokens of questions it must "
                f"not exceed the {seen} that the model sees"
            )
        return self._length


class LongContexts(ContextSuite):
    """Needles, keys and repeated passages in texts.

    Kinds: `single` hides four numbers of five digits, `multikey` eight sentences of one kind, and
    `copy` repeats the beginnings of five passages. Every context has its own text and draws.

    Args:
        folder: holds JSON lines with `text`, books.
        limit: contexts of each kind.
        length: tokens of a context; by default 2048, or three quarters of what the model sees.
        prefix: token before a context, see `prefix_tokens`.
        seed: of texts and questions.

    Raises:
        RequestError: the data cannot be read.
    """

    name = "long"
    room = 128
    kinds: ClassVar[tuple[str, ...]] = KINDS

    def __init__(
        self,
        folder: Path,
        limit: int | None = None,
        length: int | None = None,
        prefix: str = "auto",
        seed: int = 0,
    ) -> None:
        path = find_file(folder, "long", "long*.jsonl", "*books*.jsonl", "*.jsonl")
        books = (row["text"] for row in read_rows(path, {"text": is_text}))
        self._books = [book for book in books if len(book) >= _SMALLEST_BOOK]
        if not self._books:
            raise RequestError(f"{path} holds no text of {_SMALLEST_BOOK} characters")
        self.items = [
            Item((kind, number), item_key(kind, number, seed), kind)
            for number in range(limit or _CONTEXTS)
            for kind in self.kinds
        ]
        super().__init__(item_key(path.name, self._books), length, prefix, seed)

    def context(self, lm: LM, item: Item) -> LongContext:
        """See `ContextSuite.context`."""
        kind, number = item.content
        builder = ContextBuilder(
            lambda text: lm.tokenizer.encode(text, False),
            prefix_tokens(lm, self._prefix),
            self._size(lm),
        )
        rng = np.random.default_rng([self._seed, number, self.kinds.index(kind)])
        return self.built(builder, kind, self._excerpt(lm, rng), rng)

    def built(
        self, builder: ContextBuilder, kind: str, text: str, rng: np.random.Generator
    ) -> LongContext:
        """Return a context of a kind out of a text."""
        context: LongContext = getattr(builder, kind)(text, rng)
        return context

    def _excerpt(self, lm: LM, rng: np.random.Generator) -> str:
        """Return a part of a book, from a line break on; a short book goes on in others."""
        wanted = self._size(lm) * _CHARACTERS
        book = self._books[rng.integers(len(self._books))]
        start = int(rng.integers(max(1, len(book) - wanted)))
        text = str(book[start + 1 + book[start:].find("\n") :])
        while len(text) < wanted:
            text += "\n\n" + self._books[rng.integers(len(self._books))]
        return text[:wanted]


def score_answers(
    engine: Engine,
    before: Sequence[int],
    context: LongContext,
    policy: Policy | None,
    dense: bool = False,
) -> list[BranchScore]:
    """Return the score of each answer behind some tokens, which are read under a KV policy.

    With `dense` everything is read, where an attention pattern reads few positions or blocks.
    """
    if engine.pattern is not None and engine.pattern.few_read is not None:
        asked = [question.tokens[: -question.answer] for question in context.questions]
        answers = [question.tokens[-question.answer :] for question in context.questions]
        return score_decoded(engine, list(before), asked, answers, dense)
    mark = context.questions[0].tokens[:1]
    group = Branches([*before, *mark], [question.tokens[1:] for question in context.questions])
    [scores] = score_branches(engine, [group], policy, dense)
    return [
        score.last(question.answer)
        for score, question in zip(scores, context.questions, strict=True)
    ]
