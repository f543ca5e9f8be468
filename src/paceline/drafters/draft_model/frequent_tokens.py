"""Which tokens a draft model may guess: those that come most often."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from paceline.core import State, Tokens
from paceline.errors import MethodError
from paceline.models.trace import Trace

_EVERY = 64  # new tokens after which the list is made anew: each new list costs a copy of its rows


class FrequentTokens:
    """The most frequent tokens of what was seen; of equally frequent ones the lower ids.

    Tokenizers that are built by merging give frequent tokens low ids, so that a list of nothing but
    low ids is a start. A trace of the model (`paceline warm`) is a better one: each token counts
    by how often it came, and by the chances it had.

    Args:
        size: how many.
        vocab_size: tokens are below it.
        trace: of the model that drafts, or of the one it drafts for.
    """

    def __init__(self, size: int, vocab_size: int, trace: Trace | None = None) -> None:
        self._size, self._vocab_size = size, vocab_size
        self._start: NDArray[np.float64] = np.zeros(vocab_size)
        if trace is not None:
            self._start += np.bincount(trace.tokens, minlength=vocab_size)[:vocab_size]
            tops, chances = trace.top_tokens.ravel(), trace.top_probs.ravel()
            self._start += np.bincount(tops, chances, minlength=vocab_size)[:vocab_size]
        self.reset()

    def begin(self, prompt: Tokens) -> None:
        """A new request; all its tokens count."""
        self._seen = 0
        self._count(prompt)
        self._choose()

    def follow(self, context: Tokens) -> Tokens:
        """The list after `context` [S], which begins with the prompt: increasing ids, int32."""
        if len(context) - self._seen >= _EVERY:
            self._count(context)
            self._choose()
        return self.tokens

    def state(self) -> State:
        """How often each token was seen, float64 [V]."""
        return {"frequent": self._counts.copy()}

    def load(self, state: State) -> None:
        """Take over what `state` gave.

        Raises:
            MethodError: it is not such a state, or of another vocabulary.
        """
        counts = state["frequent"]
        right = counts.dtype == np.float64 and counts.shape == (self._vocab_size,)
        if not (right and (np.isfinite(counts) & (counts >= 0)).all()):
            raise MethodError("this state counts the tokens of another vocabulary; reset it")
        self._counts = counts.copy()
        self._choose()

    def reset(self) -> None:
        """Forget what was seen, but for the trace."""
        self._counts = self._start.copy()
        self._seen = 0
        self._choose()

    def _count(self, context: Tokens) -> None:
        new = context[self._seen :]
        new = new[new < self._vocab_size]
        self._counts += np.bincount(new, minlength=self._vocab_size)
        self._seen = len(context)

    def _choose(self) -> None:
        best = np.argsort(-self._counts, kind="stable")[: self._size]
        self.tokens = np.sort(best).astype(np.int32)
