"""The tokens that a draft model may propose: the most frequent ones (FR-Spec)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from paceline.core import State, Tokens
from paceline.drafters.state import checked
from paceline.models.trace import Trace

_EVERY = 64  # new tokens after which the list is renewed: each new list costs a copy of its rows


def generated_counts(trace: Trace | None, vocab_size: int) -> NDArray[np.float64] | None:
    """Return how often a trace has each token, and its probabilities added, float64 [V]."""
    if trace is None:
        return None
    counts: NDArray[np.float64] = np.zeros(vocab_size)
    counts += np.bincount(trace.tokens, minlength=vocab_size)[:vocab_size]
    tops, probs = trace.top_tokens.ravel(), trace.top_probs.ravel()
    counts += np.bincount(tops, probs, minlength=vocab_size)[:vocab_size]
    return counts


class FrequentTokens:
    """The most frequent tokens so far; of equally frequent ones those with the lower ids.

    Tokenizers built by merging give frequent tokens low ids, so that the lowest ids are a start. A
    trace of the model (`paceline warm`) is a better one: each token counts by how often it was
    generated, plus the sum of the probabilities that it had (`generated_counts`).

    Args:
        size: number of tokens in the list.
        vocab_size: every token is below it.
        start: how often each token occurred before, float64 [V]; None: never.

    Attributes:
        tokens: the list, int32, increasing.
    """

    def __init__(
        self, size: int, vocab_size: int, start: NDArray[np.float64] | None = None
    ) -> None:
        self._size, self._vocab_size = size, vocab_size
        self._start = np.zeros(vocab_size) if start is None else start
        self.reset()

    def begin(self, prompt: Tokens) -> None:
        """Start a request and count the tokens of its prompt."""
        self._seen = 0
        self._count(prompt)
        self._choose()

    def follow(self, context: Tokens) -> Tokens:
        """Count new tokens of `context` [S], which begins with the prompt; return the list."""
        if len(context) - self._seen >= _EVERY:
            self._count(context)
            self._choose()
        return self.tokens

    def state(self) -> State:
        """Return how often each token occurred, float64 [V]."""
        return {"frequent": self._counts.copy()}

    def load(self, state: State) -> None:
        """Restore what `state` returned; other names are ignored.

        Raises:
            MethodError: it is not such a state, or of another vocabulary.
        """
        own = {"frequent": state["frequent"]} if "frequent" in state else {}
        checked("model:head", own, self.state(), {"frequent": (0, np.inf)})
        self._counts = own["frequent"].copy()
        self._choose()

    def reset(self) -> None:
        """Forget what was counted, except for the trace."""
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
