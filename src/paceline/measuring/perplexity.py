"""How well a model predicts a text, in bits per byte: comparable between tokenizers and formats."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from paceline.core import Floats, TokenTree
from paceline.engines.base import Engine


class Predicted(NamedTuple):
    """What was measured.

    Attributes:
        nats: negative log-likelihood of all predicted tokens, summed.
        tokens: how many were predicted.
        bytes: UTF-8 bytes of the texts.
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Bits the model needs for a byte of text."""
        return self.nats / float(np.log(2)) / self.bytes

    @property
    def perplexity(self) -> float:
        """Exponential of the mean negative log-likelihood of a token."""
        return float(np.exp(self.nats / self.tokens))


def predict(
    engine: Engine, texts: Iterable[tuple[list[int], int]], start: int, window: int
) -> Predicted:
    """Likelihood of texts in windows of `window` tokens, each seen from its own start.

    Args:
        engine: runs the model.
        texts: token ids of each text and its size in bytes; without begin-of-text tokens.
        start: token that stands before the first token of every window.
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
    """Negative log-likelihood of ids[1:] given what is before each."""
    total = 0.0

    def observe(offset: int, tree: TokenTree, logits: Floats) -> None:
        nonlocal total
        following = ids[offset + 1 : offset + 1 + len(tree)]
        wide = logits.astype(np.float64)
        largest = wide.max(axis=1)
        mass = np.log(np.exp(wide - largest[:, None]).sum(axis=1)) + largest
        total += float((mass - wide[np.arange(len(tree)), following]).sum())

    engine.release(engine.start(ids[:-1], observe))
    return total
