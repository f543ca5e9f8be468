"""Several continuations of a text, likeliest first: by beam search, or by Superposed Decoding."""

from __future__ import annotations

from collections.abc import Sequence

from paceline.core import Request, Tokens
from paceline.decoding.strategies.base import Task
from paceline.decoding.strategies.beam import Beam
from paceline.decoding.strategies.superposed import ALPHA, Continuation, check, superposed
from paceline.engines.base import Engine
from paceline.errors import MethodError, RequestError

METHODS = ("beam", "superposed")


def completions(
    engine: Engine,
    prompt: Tokens,
    k: int,
    length: int,
    *,
    method: str = "beam",
    alpha: float | None = None,
    stop_tokens: frozenset[int] = frozenset(),
    known: Sequence[Tokens] = (),
) -> list[Continuation]:
    """At most k continuations of at most `length` tokens, likeliest first. Lossy.

    `beam` runs k nodes a pass and ranks by the chance of the whole continuation; `superposed` one
    node. The other arguments are those of `superposed`.

    Raises:
        MethodError: an unknown method, `alpha` for another than `superposed`, or as `superposed`.
        RequestError: a number out of range, or the context is too short.
    """
    if method not in METHODS:
        raise MethodError(f"the method is {method!r}, expected {' or '.join(METHODS)}")
    if method == "superposed":
        weight = ALPHA if alpha is None else alpha
        return superposed(
            engine, prompt, k, length, alpha=weight, stop_tokens=stop_tokens, known=known
        )
    if alpha is not None:
        raise RequestError("beam search uses no n-grams; leave alpha out, or take superposed")
    check(engine, prompt, k, length)
    request = Request(tuple(prompt.tolist()), length, stop_tokens=stop_tokens)
    found = Beam(width=k, returned=k, length_penalty=0.0).run(Task(engine, request))
    return [Continuation(tuple(one.tokens), one.score) for one in found]
