"""Earlier calls of the Python API that still work for one release."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

from paceline.decoding.strategies.base import Strategy
from paceline.decoding.strategies.beam import Beam
from paceline.decoding.strategies.superposed import Superposed
from paceline.errors import MethodError, RequestError
from paceline.request_options import Prompt

if TYPE_CHECKING:
    from paceline.lm import LM


class Completion(NamedTuple):
    """One of several continuations.

    Attributes:
        text: without a stop token at its end.
        score: logarithm of the probability that the model gives all its tokens.
        tokens: token ids.
    """

    text: str
    score: float
    tokens: tuple[int, ...]


def complete(
    lm: LM,
    prompt: Prompt,
    n: int = 3,
    *,
    max_new_tokens: int = 10,
    method: str = "beam",
    alpha: float | None = None,
) -> list[Completion]:
    """Return `n` continuations of a prompt, most probable first; use `LM.search` instead.

    Args:
        lm: the model.
        prompt: text, token ids or chat messages.
        n: how many.
        max_new_tokens: upper limit of each, in tokens.
        method: `beam` or `superposed`.
        alpha: of `superposed`: weight, 0 to 1, of n-grams of the prompt and of what
            `paceline warm` kept. None is 0.

    Raises:
        MethodError, RequestError: what is wrong and what to do.
    """
    warnings.warn("LM.complete is now LM.search", DeprecationWarning, stacklevel=3)
    if method not in ("beam", "superposed"):
        raise MethodError(f"the method is {method!r}, expected beam or superposed")
    if method == "beam" and alpha is not None:
        raise RequestError("beam search uses no n-grams; leave alpha out, or take superposed")
    context = lm.engine.config.context
    room = context - len(lm.request_builder.encode(prompt)[0])
    if room >= 1 and not 1 <= max_new_tokens <= room:
        raise RequestError(
            f"continuations of {max_new_tokens} tokens are requested, expected 1 to {room}: "
            f"the model sees {context} tokens, the prompt among them"
        )
    strategy: Strategy = Beam(width=n, returned=n, length_penalty=0.0)
    if method == "superposed":
        strategy = Superposed(width=n, returned=n, alpha=alpha or 0.0)
    outputs = lm.search(prompt, strategy, max_new_tokens=max_new_tokens, controls={})
    return [Completion(each.text, each.score, tuple(each.tokens)) for each in outputs]
