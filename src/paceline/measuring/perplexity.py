"""How well a model predicts texts, in bits per byte: comparable across tokenizers and formats."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from paceline.core import Floats, TokenTree
from paceline.engines.base import Engine
from paceline.scoring import token_logprobs


class Predicted(NamedTuple):
    """The likelihood of some texts.

    Attributes:
        nats: negative log-likelihood of all predicted tokens, summed.
        tokens: number of predicted tokens.
        bytes: UTF-8 bytes of the texts.
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs for a byte of text."""
        return self.nats / float(np.log(2)) / self.bytes

    @property
    def perplexity(self) -> float:
        """Exponential of the mean negative log-likelihood of a token."""
        return float(np.exp(self.nats / self.tokens))


def predict(
    engine: Engine, texts: Iterable[tuple[list[int], int]], start: int, window: int
) -> Predicted:
    """Return the likelihood of texts in windows of `window` tokens, each with its own start.

    Args:
        engine: runs the model.
        texts: token ids of each text and its size in bytes; without begin-of-text tokens.
        start: token before the first token of every window.
        window: tokens predicted in a row; at most the model's context.
    """
    nats, tokens, size = 0.0, 0, 0
    for ids, count in texts:
        size += count
        for begin in range(0, len(ids), window):
            part = ids[begin : begin + window]
            nats += _nats(engine, np.array([start, *part], np.int32))
            tokens += len(part)
    return Predicted(nats, tokens, size)


def _nats(engine: Engine, ids: np.ndarray) -> float:
    """Return the negative log-likelihood of ids[1:], each given the tokens before it."""
    total = 0.0

    def observe(offset: int, tree: TokenTree, logits: Floats) -> None:
        nonlocal total
        following = ids[offset + 1 : offset + 1 + len(tree)]
        total -= float(token_logprobs(logits, following).sum())

    engine.release(engine.start(ids[:-1], observe))
    return total
