"""What compression costs: nats a token, paired window by window against the model it came from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats, TokenTree
from paceline.engines.base import Engine
from paceline.errors import RequestError
from paceline.models.tokenizer import Tokenizer
from paceline.scoring import token_logprobs

WINDOW = 512  # tokens, context and stride
MIN_WINDOWS = 2  # for a standard error


class Scores(NamedTuple):
    """How a model predicts some windows.

    Attributes:
        nats: negative log-likelihood of a token, mean of each window, float64 [windows].
        firsts: most likely next token at each position, int32 [windows, tokens].
        bits_per_byte: over all windows.
    """

    nats: NDArray[np.float64]
    firsts: NDArray[np.int32]
    bits_per_byte: float

    @property
    def mean(self) -> float:
        """Nats a token over all windows."""
        return float(self.nats.mean())

    @property
    def error(self) -> float:
        """Standard error of the mean over windows."""
        return float(self.nats.std(ddof=1) / np.sqrt(len(self.nats)))


@dataclass(frozen=True)
class Loss:
    """What one model loses against another on the same windows.

    Attributes:
        nats: mean difference in nats a token; above 0 is worse.
        error: standard error of the differences, over windows.
        firsts: share of positions at which both have the same most likely token.
    """

    nats: float
    error: float
    firsts: float


@dataclass(frozen=True)
class Windows:
    """Windows of one text.

    Attributes:
        tokens: int32 [windows, tokens + 1], each after a token that starts it.
        bytes: UTF-8 bytes of all windows' texts.
    """

    tokens: NDArray[np.int32]
    bytes: int

    @classmethod
    def cut(
        cls,
        tokens: Sequence[int],
        opening: Sequence[int],
        decode: Callable[[list[int]], str],
        size: int = WINDOW,
        limit: int | None = None,
    ) -> Windows:
        """Cut a text into windows, each with its own start; the rest is left out.

        Args:
            tokens: of the text, without begin-of-text tokens.
            opening: begin-of-text tokens; without any, the first token of a window starts it.
            decode: turns tokens into text.
            size: tokens of a window, with its start.
            limit: at most so many windows.

        Raises:
            RequestError: the text is shorter than two windows.
        """
        step = size - len(opening)
        count = min(len(tokens) // step, limit or len(tokens))
        if count < MIN_WINDOWS:
            raise RequestError(
                f"the text has {len(tokens)} tokens, expected at least {MIN_WINDOWS * step} for "
                f"{MIN_WINDOWS} windows of {size}"
            )
        cut = np.array(tokens[: count * step], np.int32).reshape(count, step)
        size_bytes = sum(len(decode(row.tolist()).encode()) for row in cut)
        start = np.tile(np.array(opening, np.int32), (count, 1))
        return cls(np.concatenate([start, cut], 1), size_bytes)

    def score(self, engine: Engine, tick: Callable[[int], None] = lambda done: None) -> Scores:
        """Return how a model predicts the windows."""
        nats, firsts = [], []
        for window in self.tokens:
            losses, first = score_window(engine, window)
            nats.append(losses)
            firsts.append(first)
            tick(1)
        total = np.stack(nats)
        bits = float(total.sum() / np.log(2) / self.bytes)
        return Scores(total.mean(1), np.stack(firsts), bits)


def text_windows(tokenizer: Tokenizer, text: str, size: int, limit: int | None = None) -> Windows:
    """Return the windows of a text; see `Windows.cut`.

    Raises:
        RequestError: the text is too short.
    """
    usual = tokenizer.encode("")
    tokens = tokenizer.encode(text)[len(usual) :]
    return Windows.cut(tokens, usual[:1], tokenizer.decode, size, limit)


def paired(scores: Scores, base: Scores) -> Loss:
    """Return what a model loses against `base`, scored on the same windows."""
    delta = scores.nats - base.nats
    return Loss(
        float(delta.mean()),
        float(delta.std(ddof=1) / np.sqrt(len(delta))),
        float((scores.firsts == base.firsts).mean()),
    )


def score_window(
    engine: Engine, window: NDArray[np.int32]
) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """Return the nats of window[1:], float64, and the most likely tokens there, int32."""
    nats: list[NDArray[np.float64]] = []
    firsts: list[NDArray[np.int32]] = []

    def observe(offset: int, tree: TokenTree, logits: Floats) -> None:
        following = window[offset + 1 : offset + 1 + len(tree)]
        nats.append(-token_logprobs(logits, following))
        firsts.append(logits.argmax(axis=1).astype(np.int32))

    engine.release(engine.start(window[:-1], observe))
    return np.concatenate(nats), np.concatenate(firsts)
