"""One model's sequence that follows the target's text."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import NamedTuple, Self

import numpy as np

from paceline.core import Floats, Tokens, TokenTree
from paceline.engines.base import Cached, Engine
from paceline.engines.follower import Follower


class GuideStream:
    """Runs trees after the target's text, or after one with another beginning.

    Args:
        engine: runs the model.
        size: of the target's vocabulary.
        begin: tokens that replace the first `instead` tokens of the target's text.
        instead: how many are replaced.
    """

    def __init__(
        self, engine: Engine, size: int, begin: Sequence[int] = (), instead: int = 0
    ) -> None:
        self.engine = engine
        self.follower = Follower(engine)
        self.size, self._begin, self._instead = size, np.array(begin, np.int32), instead

    def lag(self, context: Tokens) -> int:
        """Return how many tokens of the target's text [S] are unread."""
        return self.follower.behind(self._own(context))

    def follow(self, context: Tokens, max_tokens: int | None = None) -> int:
        """Read the target's text [S] but its last token, at most `max_tokens`; return how many."""
        return self.follower.follow(self._own(context), max_tokens)

    def length(self, context: int) -> int:
        """Return the number of positions that `context` tokens of the target's text take."""
        return context + len(self._begin) - self._instead

    def run(self, context: Tokens, tree: TokenTree, target: Cached | None = None) -> Floats:
        """Return the logits [N, V] of a tree whose root is `context[-1]`; see `GuidePass`."""
        return self.together([GuidePass(self, context, tree, target)])[0]

    @staticmethod
    def together(asked: Sequence[GuidePass]) -> list[Floats]:
        """Run several streams in one pass; they are of one kind, and share an engine."""
        entries = [each.stream.ready(each.context, each.tree) for each in asked]
        logits = asked[0].stream.engine.forward(entries)
        parts = np.split(logits, np.cumsum([len(tree) for _, tree in entries])[:-1])
        logits_of = []
        for each, (_, tree), rows in zip(asked, entries, parts, strict=True):
            each.stream.follower.ran(tree)
            logits_of.append(fitted(rows[-len(each.tree) :], each.stream.size))
        return logits_of

    def ready(self, context: Tokens, tree: TokenTree) -> tuple[Cached, TokenTree]:
        """Return the sequence and tree that the engine must run; see `Follower.ready`."""
        own = self._own(context)
        if own[-1] != tree.tokens[0]:  # the root is one of the replaced tokens
            tree = replace(tree, tokens=np.append(own[-1:], tree.tokens[1:]))
        return self.follower.ready(own, tree)

    def fork(self, context: Tokens) -> Self:
        """Return a stream that shares what this one has read of the text [S]."""
        other = copy(self)
        other.follower = self.follower.fork(self._own(context))
        return other

    def release(self) -> None:
        """Release the sequence."""
        self.follower.reset()

    def _own(self, context: Tokens) -> Tokens:
        if not self._instead and not len(self._begin):
            return context
        return np.concatenate([self._begin, context[self._instead :]])


class GuidePass(NamedTuple):
    """A tree for a stream to run.

    Attributes:
        context: the target's text [S].
        tree: its root is `context[-1]`.
        target: the target's own sequence, which holds the text before the root; may be None.
    """

    stream: GuideStream
    context: Tokens
    tree: TokenTree
    target: Cached | None = None


def fitted(rows: Floats, size: int) -> Floats:
    """Return a copy of a guide's logits [N, V'] for a vocabulary of `size`.

    Padding tokens that only the target has get the guide's lowest logit.
    """
    lacking = size - rows.shape[1]
    if lacking <= 0:
        return rows[:, :size].copy()
    lowest = np.repeat(rows.min(1, keepdims=True), lacking, 1)
    return np.concatenate([rows, lowest], 1)
