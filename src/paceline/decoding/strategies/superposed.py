"""Superposed Decoding: several continuations for little more than the passes of one. Lossy.

Based on Shen et al., arXiv 2405.18400 (catalogue 445). Each pass sees one node: the mean of the
last tokens' embeddings of k drafts, weighted by their chances. Its k likeliest tokens may follow
any draft, by the chance that the model gives them and the chance that n-grams of known texts do:

    p(x | draft) = p_model(x | all drafts) ** (1 - alpha) * p_ngrams(x | draft) ** alpha

The k likeliest of the k * k drafts go on. Where drafts part widely, the model sees a blur of them,
and the n-grams alone know which token belongs to which draft. At the end one plain pass over all
drafts as a tree gives the chance that the model itself gives each, to rank them by.

It is no drafter for the exact walk: the draft passes would be passes of the model itself, one for
each level, and so cost what plain decoding does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from paceline import _native
from paceline.core import Floats, Tokens, TokenTree
from paceline.engines.base import Cached, Engine
from paceline.errors import MethodError, RequestError

LONGEST = 5  # tokens that an n-gram looks back, at most
MOST = 64  # continuations
ALPHA = 0.0  # n-grams of little text make it worse; the paper's are of a corpus


class Continuation(NamedTuple):
    """Some tokens, and the logarithm of the chance that the model gives all of them."""

    tokens: tuple[int, ...]
    score: float


class Ngrams:
    """What follows the last tokens of a text in known texts.

    Args:
        texts: token ids, each int32 [S].
    """

    def __init__(self, texts: Sequence[Tokens]) -> None:
        # No token is -1: what stands in one text does not go on in the next.
        parts = [part for text in texts for part in (text, np.array([-1], np.int32))]
        self._text = np.concatenate([np.array([-1], np.int32), *parts]).astype(np.int32)

    def probs(
        self, context: Tokens, tokens: Tokens, base: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Chances of `tokens` [K] after `context` [S], each order mixed with the one below it.

        An order of c occurrences with d kinds of successors counts c / (c + d) (Witten and Bell);
        below the lowest lies `base` [K], which is what is left where nothing is known.
        """
        probs, text = base, self._text
        ends = np.arange(len(text) - 1)
        for back, token in enumerate(context[::-1][:LONGEST].tolist()):
            ends = ends[ends >= back]
            ends = ends[text[ends - back] == token]
            followers = text[ends + 1]
            followers = followers[followers >= 0]
            if not len(followers):
                break
            kinds = len(np.unique(followers))
            counts = (followers[:, None] == tokens).sum(0)
            probs = (counts + kinds * probs) / (len(followers) + kinds)
        return probs


class _Draft(NamedTuple):
    tokens: tuple[int, ...]
    score: float  # by which drafts are kept
    done: bool = False


def superposed(
    engine: Engine,
    prompt: Tokens,
    k: int,
    length: int,
    *,
    alpha: float = ALPHA,
    stop_tokens: frozenset[int] = frozenset(),
    known: Sequence[Tokens] = (),
) -> list[Continuation]:
    """The k likeliest continuations that `length` passes find, likeliest first.

    With k = 1 it is greedy decoding.

    Args:
        engine: has the ability `mixtures`.
        prompt: int32 [S], at least one token.
        k: how many, 1 to 64; fewer come back of a smaller vocabulary, or where all end early.
        length: most tokens of each.
        alpha: weight of the n-grams, 0 to 1.
        stop_tokens: end a continuation, and are its last token.
        known: texts whose n-grams count, besides the prompt.

    Raises:
        MethodError: the engine cannot mix.
        RequestError: a number out of range, or the context is too short.
    """
    if "mixtures" not in engine.abilities:
        raise MethodError(
            f"superposed decoding needs an engine that can mix tokens, and {engine.name} cannot; "
            "use native or reference"
        )
    check(engine, prompt, k, length)
    if not 0 <= alpha <= 1:
        raise RequestError(f"alpha is {alpha}, expected 0 to 1")
    ngrams = Ngrams([*known, prompt])
    sequence = engine.start(prompt[:-1])
    try:
        logits = engine.forward([(sequence, TokenTree.root(int(prompt[-1])))])
        engine.commit(sequence, [0])
        drafts = [_Draft((), 0.0)]
        for left in range(length, 0, -1):
            drafts = _grown(drafts, logits, k, alpha, ngrams, prompt, stop_tokens)
            going = [draft for draft in drafts if not draft.done]
            if not going or left == 1:
                break
            logits = engine.forward_mixed(sequence, *_mixture(going))
            engine.commit(sequence, [0])
        engine.truncate(sequence, len(prompt) - 1)
        return _ranked(engine, sequence, int(prompt[-1]), [draft.tokens for draft in drafts])
    finally:
        engine.release(sequence)


def _grown(
    drafts: list[_Draft],
    logits: Floats,
    k: int,
    alpha: float,
    ngrams: Ngrams,
    prompt: Tokens,
    stop_tokens: frozenset[int],
) -> list[_Draft]:
    """The k best among drafts that are done and one token more of each that is not."""
    best, probs = _native.top(logits, min(k, logits.shape[1]))
    tokens, base = best[0], np.maximum(probs[0].astype(np.float64), np.finfo(np.float32).tiny)
    found = [draft for draft in drafts if draft.done]
    for draft in drafts:
        if draft.done:
            continue
        context = np.append(prompt[-LONGEST:], np.array(draft.tokens, np.int32))
        likely = ngrams.probs(context, tokens, base)
        scores = draft.score + (1 - alpha) * np.log(base) + alpha * np.log(likely)
        for token, score in zip(tokens.tolist(), scores.tolist(), strict=True):
            found.append(_Draft((*draft.tokens, token), score, token in stop_tokens))
    return sorted(found, key=lambda draft: -draft.score)[:k]


def _mixture(drafts: list[_Draft]) -> tuple[Tokens, Floats]:
    """The drafts' last tokens [1, K], weighted by the drafts' chances."""
    scores = np.array([draft.score for draft in drafts])
    weights = np.exp(scores - scores.max())
    tokens = np.array([[draft.tokens[-1] for draft in drafts]], np.int32)
    return tokens, (weights / weights.sum()).astype(np.float32)[None]


def _ranked(
    engine: Engine, sequence: Cached, root: int, texts: list[tuple[int, ...]]
) -> list[Continuation]:
    """Continuations by the chance that the model gives them, from one pass over all as a tree."""
    tokens, parents = [root], [-1]
    places: dict[tuple[int, ...], int] = {(): 0}
    for text in texts:
        for end in range(1, len(text)):  # what follows the last token is not asked
            if text[:end] not in places:
                places[text[:end]] = len(tokens)
                parents.append(places[text[: end - 1]])
                tokens.append(text[end - 1])
    n = len(tokens)
    tree = TokenTree(
        np.array(tokens, np.int32),
        np.array(parents, np.int32),
        np.ones(n, np.float32),
        np.array([-1, *[0] * (n - 1)], np.int16),
    )
    logits = engine.forward([(sequence, tree)]).astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    found = [
        Continuation(text, float(sum(logs[places[text[:i]], t] for i, t in enumerate(text))))
        for text in texts
    ]
    return sorted(found, key=lambda one: -one.score)


def check(engine: Engine, prompt: Tokens, k: int, length: int) -> None:
    """Refuse numbers out of range.

    Raises:
        RequestError: the empty prompt, too many continuations, or too long ones.
    """
    if not len(prompt):
        raise RequestError("the prompt is empty; give at least one token")
    if not 1 <= k <= MOST:
        raise RequestError(f"{k} continuations are asked for, expected 1 to {MOST}")
    room = engine.config.context - len(prompt)
    if room < 1:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens, but the model sees {engine.config.context}; "
            "shorten it"
        )
    if not 1 <= length <= room:
        raise RequestError(
            f"continuations of {length} tokens are asked for, expected 1 to {room}: the model sees "
            f"{engine.config.context} tokens, the prompt among them"
        )
