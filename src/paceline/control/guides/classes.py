"""What `gedi` and `air` share: two class-conditional readings of a text, weighed by Bayes' rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from paceline.control.guides.base import Guidance, Logs, look_together
from paceline.control.guides.voice import Voice
from paceline.core import Floats, Request, Tokens, TokenTree

# The prompt's logits are made in pieces of at most this many floats.
_LOGITS = 1 << 23

Sums = tuple[float, float]


def wanted(evidence: Sequence[Logs]) -> Logs:
    """Log chance of the first class after each token [V], both being as likely before."""
    found: Logs = evidence[0] - np.logaddexp(evidence[0], evidence[1])
    return found


class ClassGuidance(Guidance):
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
        voices: Sequence[Voice],
        request: Request,
        first: int,
    ) -> None:
        super().__init__(weigh, voices, request)
        self._score, self._first = score, first
        self._sums: Sums = (0.0, 0.0)  # over the context of the last tree

    def read(self, prompt: Tokens) -> None:
        """Score the prompt."""
        look_together([(self, prompt, TokenTree.root(int(prompt[-1])))])

    def guided(
        self, logits: Floats, rows: list[Floats], history: list[int], edit: Callable[..., Floats]
    ) -> Floats:
        """See `Guidance`."""
        sums = self._after(history)
        assert sums is not None
        scores = [self._score(row) for row in rows]
        return edit(logits, scores, sums, len(history) - self._first)

    def prepare(self, context: Tokens) -> bool:
        """See `Guidance`; knows the sums over `context` from the last tree, or makes them anew."""
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

    def _summed(self, context: Tokens) -> Sums:
        """The sums over `context`, run in pieces."""
        sums: Sums = (0.0, 0.0)
        size = max(16, min(256, _LOGITS // self.voices[0].engine.config.vocab_size))
        for start in range(self._first - 1, len(context) - 1, size):
            chain = TokenTree.chain(context[start : min(start + size, len(context) - 1)])
            rows = [voice.run(context[: start + 1], chain) for voice in self.voices]
            for node, token in enumerate(context[start + 1 :][: len(chain)].tolist()):
                sums = self._added(sums, [each[node] for each in rows], token)
        return sums

    def _added(self, sums: Sums, rows: list[Floats], token: int) -> Sums:
        wanted, other = (float(self._score(row)[token]) for row in rows)
        return sums[0] + wanted, sums[1] + other
