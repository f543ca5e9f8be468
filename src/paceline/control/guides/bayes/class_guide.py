"""What `gedi` and `air` share: two class-conditional readings of a text, weighed by Bayes' rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from paceline.control.guides.base import Guide, Logs
from paceline.control.guides.guide_stream import GuideStream
from paceline.core import Floats, Request, Tokens, TokenTree

# The prompt's logits are made in pieces of at most this many floats.
_LOGITS = 1 << 23

Sums = tuple[float, float]


def wanted(evidence: Sequence[Logs]) -> Logs:
    """Log chance of the first class after each token [V], both being as likely before."""
    found: Logs = evidence[0] - np.logaddexp(evidence[0], evidence[1])
    return found


class ClassGuide(Guide):
    """Keeps, for each class, the sum of the scores of a text's tokens.

    Sums are made token by token, in order: the same floats however the text was drafted.

    Args:
        weigh: makes of the logits [V], the scores [V] of every token in each class, the sums
            before it and the number of tokens in them the guided logits [V].
        score: scores of every token [V], by a class's logits there.
        voices: of the class that is wanted, and of the other.
        request: whose text they read.
        first: position of the first token whose score counts, at least 1.
    """

    def __init__(
        self,
        weigh: Callable[[Floats, list[Logs], Sums, int], Floats],
        score: Callable[[Floats], Logs],
        streams: Sequence[GuideStream],
        request: Request,
        first: int,
    ) -> None:
        super().__init__(weigh, streams, request)
        self._score, self._first = score, first
        self._sums: Sums = (0.0, 0.0)  # over the context of the last tree
        self._scored = np.empty(0, np.int32)  # the text that was read last
        self._read: Sums = (0.0, 0.0)  # over it

    def lag(self, context: Tokens) -> int:
        """See `Looking`."""
        if self._after(context.tolist()) is not None:
            return 0
        known = self._known(context)
        before = super().lag(context[:known]) if known == self._first else 0
        return before + max(len(context) - known, 0)

    def follow(self, context: Tokens, max_tokens: int | None = None) -> int:
        """See `Looking`: tokens are scored as they are read."""
        known = self._known(context)
        if known == self._first:  # what does not count is read without scores
            read = super().follow(context[:known], max_tokens)
            if read and max_tokens is not None:
                return read
        if self._after(context.tolist()) is not None:
            return 0
        return self._score_more(context, len(context) if max_tokens is None else max_tokens)

    def release(self) -> None:
        """See `Looking`."""
        super().release()
        self._scored = self._scored[:0]

    def guided(
        self, logits: Floats, rows: list[Floats], history: list[int], edit: Callable[..., Floats]
    ) -> Floats:
        """See `Guide`."""
        sums = self._after(history)
        assert sums is not None
        scores = [self._score(row) for row in rows]
        return edit(logits, scores, sums, len(history) - self._first)

    def prepare(self, context: Tokens) -> bool:
        """See `Guide`; knows the sums over `context` from the last tree, or makes them anew."""
        sums = self._after(context.tolist())
        self._tree = None
        self._sums = self._summed(context) if sums is None else sums
        return True

    def _after(self, history: list[int]) -> Sums | None:
        """The sums over a text that goes on from the last tree's, along its nodes."""
        size = len(self._context)
        if self._tree is None or history[:size] != self._context:
            return None
        sums: Sums = self._sums
        node: int | None = 0
        for token in history[size:]:
            if node is None:
                return None
            sums = self._added(sums, [rows[node] for rows in self._rows], token)
            node = self._tree.child(node, token)
        return sums

    def _known(self, context: Tokens) -> int:
        """How many tokens of `context` are scored; those before the first count as such."""
        size = len(self._scored)
        same = size <= len(context) and np.array_equal(self._scored, context[:size])
        return max(size if same else 0, self._first)

    def _summed(self, context: Tokens) -> Sums:
        """The sums over `context`."""
        self._score_more(context, len(context))
        return self._read if len(context) > self._first else (0.0, 0.0)

    def _score_more(self, context: Tokens, max_tokens: int) -> int:
        """Score up to `max_tokens` tokens more of `context`, run in pieces; how many there were."""
        begin = self._known(context)
        if begin == self._first:
            self._scored, self._read = self._scored[:0], (0.0, 0.0)
        end = min(begin + max_tokens, len(context))
        size = max(16, min(256, _LOGITS // self.streams[0].engine.config.vocab_size))
        for start in range(begin, end, size):
            chain = TokenTree.chain(context[start - 1 : min(start + size, end) - 1])
            rows = [stream.run(context[:start], chain) for stream in self.streams]
            for node, token in enumerate(context[start:][: len(chain)].tolist()):
                self._read = self._added(self._read, [each[node] for each in rows], token)
            self._scored = context[: start + len(chain)].copy()
        return max(end - begin, 0)

    def _added(self, sums: Sums, rows: list[Floats], token: int) -> Sums:
        wanted, other = (float(self._score(row)[token]) for row in rows)
        return sums[0] + wanted, sums[1] + other
