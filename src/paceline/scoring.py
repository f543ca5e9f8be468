"""The probability that a model gives to a text, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats, Tokens, TokenTree
from paceline.engines.base import Engine
from paceline.errors import ModelError, RequestError


class Score(NamedTuple):
    """How probable a text is.

    Attributes:
        tokens: token ids of the text, those included that begin every text.
        logprobs: for each token the natural logarithm of its probability given the tokens before
            it, in nats; None for the first, before which there is nothing.
        total: sum of these logarithms.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    total: float


def score_tokens(engine: Engine, tokens: Sequence[int]) -> Score:
    """Return the score of a text.

    Args:
        engine: runs the model.
        tokens: token ids [S], at most the model's context.

    Raises:
        RequestError: there are more, or one is outside the vocabulary.
        ModelError: the model's logits are not finite.
    """
    if len(tokens) > engine.config.context:
        raise RequestError(
            f"the text has {len(tokens)} tokens, but the model sees {engine.config.context}; "
            "shorten it"
        )
    if len(tokens) < 2:
        return Score(tuple(tokens), (None,) * len(tokens), 0.0)
    ids = np.array(tokens, np.int32)
    logprobs: list[float] = []

    def observe(offset: int, tree: TokenTree, logits: Floats) -> None:
        after = ids[offset + 1 : offset + 1 + len(tree)]
        logprobs.extend(token_logprobs(logits, after).tolist())

    engine.release(engine.start(ids[:-1], observe))
    check_finite(logprobs)
    return Score(tuple(tokens), (None, *logprobs), float(sum(logprobs)))


def check_finite(logprobs: Sequence[float]) -> None:
    """Refuse log-probabilities of which one is infinite or no number.

    Raises:
        ModelError: names its position.
    """
    if not np.isfinite(logprobs).all():
        place = int(np.flatnonzero(~np.isfinite(logprobs))[0])
        raise ModelError(
            f"the model's logits at position {place} are not finite; its weights or its number "
            "format cannot represent this text"
        )


def token_logprobs(logits: Floats, tokens: Tokens) -> NDArray[np.float64]:
    """Return log softmax(logits [N, V]) at `tokens` [N], float64 [N]."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    chosen: NDArray[np.float64] = wide[np.arange(len(tokens)), tokens]
    chosen -= np.log(np.exp(wide).sum(axis=1))
    return chosen
