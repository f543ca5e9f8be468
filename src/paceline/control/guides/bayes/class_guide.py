"""Class-conditional guidance by Bayes' rule, for `gedi` and `air`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from paceline.control.guides.base import Guide, Logs
from paceline.control.guides.guide_stream import GuideStream
from paceline.core import Floats, Request, Tokens, TokenTree

# Logits of the prompt are computed in chunks of at most this many floats.
_LOGITS = 1 << 23

Sums = tuple[float, float]


def class_log_probs(evidence: Sequence[Logs]) -> Logs:
    """Return the log-probability of the first of two classes after each token, [V].

    Args:
        evidence: log-likelihood [V] of the text under each class; both have prior 1/2.
    """
    log_probs: Logs = evidence[0] - np.logaddexp(evidence[0], evidence[1])
    return log_probs


class ClassGuide(Guide):
    """Keeps, for each class, the sum of the scores of a text's tokens.

    Sums are accumulated token by token, so that the floats do not depend on drafting.

    Args:
        weigh: from the logits [V], the scores [V] of every token in each class, the sums before it
            and the number of tokens in these to the guided logits [V].
        score: from a class's logits [V] to the score of every token [V].
        streams: of the desired class, and of the other.
        request: whose text they follow.
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
        self._scored = np.empty(0, np.int32)  # the text that was scored last
        self._read: Sums = (0.0, 0.0)  # over that text

    def lag(self, context: Tokens) -> int:
        """See `RunsModel`."""
        if self._after(context.tolist()) is not None:
            return 0
        known = self._known(context)
        before = super().lag(context[:known]) if known == self._first else 0
        return before + max(len(context) - known, 0)

    def follow(self, context: Tokens, max_tokens: int | None = None) -> int:
        """See `RunsModel`; tokens are scored as they are read."""
        known = self._known(context)
        if known == self._first:  # tokens that do not count are read without scores
            read = super().follow(context[:known], max_tokens)
            if read and max_tokens is not None:
                return read
        if self._after(context.tolist()) is not None:
            return 0
        return self._score_more(context, len(context) if max_tokens is None else max_tokens)

    def release(self) -> None:
        """See `RunsModel`."""
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
        """See `Guide`; takes the sums over `context` from the last tree, or computes them."""
        sums = self._after(context.tolist())
        self._tree = None
        self._sums = self._summed(context) if sums is None else sums
        return True

    def _after(self, history: list[int]) -> Sums | None:
        """Return the sums over a text that follows nodes of the last tree; None for other texts."""
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
        """Return how many tokens of `context` are scored, counting those before the first."""
        size = len(self._scored)
        same = size <= len(context) and np.array_equal(self._scored, context[:size])
        return max(size if same else 0, self._first)

    def _summed(self, context: Tokens) -> Sums:
        """Return the sums over `context`."""
        self._score_more(context, len(context))
        return self._read if len(context) > self._first else (0.0, 0.0)

    def _score_more(self, context: Tokens, max_tokens: int) -> int:
        """Score up to `max_tokens` more of `context`, in chunks; return how many were scored."""
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
        own, other = (float(self._score(row)[token]) for row in rows)
        return sums[0] + own, sums[1] + other
