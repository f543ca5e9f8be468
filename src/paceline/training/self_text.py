"""Text that a model generates by itself, with its top-k predictions at every token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count

import numpy as np

from paceline import _native
from paceline.control.temperature import Temperature
from paceline.core import Request, TokenTree
from paceline.decoding.walk import draw
from paceline.engines.base import Cached, Engine
from paceline.errors import RequestError
from paceline.models.trace import Trace

_TOP = 16  # successors kept per token; no drafter uses more by default
_LENGTH = 400  # default maximum of tokens in one text
_STREAMS = 16  # texts written at once, as a pass over many sequences costs little more than one


class _SelfText:
    """One running text."""

    def __init__(self, sequence: Cached, tokens: list[int]) -> None:
        self.sequence, self.tokens = sequence, tokens
        self.top_tokens: list[np.ndarray] = []
        self.top_probs: list[np.ndarray] = []


def selftext(
    engine: Engine,
    tokens: int,
    opening: list[int],
    stop_tokens: frozenset[int],
    temperature: float = 0.7,
    seed: int = 0,
    progress: Callable[[int], None] = lambda count: None,
    longest: int = _LENGTH,
) -> Trace:
    """Let a model write `tokens` tokens or a few more without a prompt, several texts at once.

    Half of the texts begin with `opening` only, the others with one more token, which runs through
    the vocabulary in an order shuffled by `seed`. Without `opening`, all begin with such a token.

    Args:
        engine: runs the model.
        tokens: how many to write in total; running texts are cut there.
        opening: tokens that the tokenizer puts before every text; may be empty.
        stop_tokens: end a text.
        temperature: of the draws; lower values are closer to greedy outputs.
        seed: keys the draws.
        progress: called with the number of new tokens after each pass.
        longest: maximum tokens of one text.

    Raises:
        RequestError: a number is out of range.
    """
    starts = _bare_starts(opening, engine.config.vocab_size, seed)
    length = min(longest, engine.config.context - 1)
    return _write_texts(
        engine,
        tokens,
        starts,
        lambda text, start: text > length,
        stop_tokens,
        temperature,
        seed,
        progress,
    )


def self_answers(
    engine: Engine,
    tokens: int,
    prompts: Iterable[list[int]],
    stop_tokens: frozenset[int],
    temperature: float = 0.7,
    seed: int = 0,
    progress: Callable[[int], None] = lambda count: None,
    longest: int = _LENGTH,
) -> Trace:
    """Let a model answer prompts, in order, until it has written `tokens` tokens or a few more.

    Prompts for which the model's context has no room are left out. The trace holds the answers,
    each after the last token of its prompt.

    Args:
        engine: runs the model.
        tokens: how many to write in total; running answers are cut there.
        prompts: token ids of each, at least as many as needed; a sequence is begun again at its
            end.
        stop_tokens: end an answer.
        temperature: of the draws.
        seed: keys the draws.
        progress: called with the number of new tokens after each pass.
        longest: maximum tokens of one answer.

    Raises:
        RequestError: a number is out of range, or no prompt fits.
    """
    context = engine.config.context
    return _write_texts(
        engine,
        tokens,
        _fitting(prompts, context),
        lambda text, start: text - start >= longest or text >= context,
        stop_tokens,
        temperature,
        seed,
        progress,
    )


def _bare_starts(opening: list[int], vocab_size: int, seed: int) -> Iterator[list[int]]:
    first = np.random.default_rng(seed).permutation(vocab_size)
    for opened in count():
        start = list(opening)
        if not opening or opened % 2:
            start.append(int(first[opened // (2 if opening else 1) % len(first)]))
        yield start


def _fitting(prompts: Iterable[list[int]], context: int) -> Iterator[list[int]]:
    while True:
        fitting = 0
        for prompt in prompts:
            if 0 < len(prompt) <= context // 2:
                fitting += 1
                yield prompt
        if not fitting:
            raise RequestError(f"no prompt has 1 to {context // 2} tokens; give shorter ones")


def _write_texts(
    engine: Engine,
    tokens: int,
    starts: Iterator[list[int]],
    is_long: Callable[[int, int], bool],
    stop_tokens: frozenset[int],
    temperature: float,
    seed: int,
    progress: Callable[[int], None],
) -> Trace:
    """Write texts behind `starts`; `is_long` tells by its tokens and its start's if one is cut."""
    if tokens < 1:
        raise RequestError(f"tokens is {tokens}, expected 1 or more")
    if not 0 < temperature < np.inf:
        raise RequestError(f"the temperature is {temperature}, expected more than 0")
    done: list[_SelfText] = []
    running: list[_SelfText] = []
    opened = written = 0
    try:
        while written < tokens:
            while len(running) < _STREAMS:
                start = next(starts)
                sequence = engine.start(np.array(start[:-1], np.int32))
                # Predictions within the start are not kept: the text begins at its root.
                running.append(_SelfText(sequence, list(start)))
                opened += 1
            _write(engine, running, temperature, seed + opened)
            written += len(running)
            progress(len(running))
            for text in list(running):
                begun = len(text.tokens) - len(text.top_tokens)
                ended = text.tokens[-1] in stop_tokens or is_long(len(text.tokens), begun)
                if ended or written >= tokens:
                    running.remove(text)
                    engine.release(text.sequence)
                    done.append(text)
    finally:
        for text in running:
            engine.release(text.sequence)
    return _joined(done)


def _write(engine: Engine, texts: list[_SelfText], temperature: float, seed: int) -> None:
    """Write one more token of each text."""
    logits = engine.forward([(text.sequence, TokenTree.root(text.tokens[-1])) for text in texts])
    top_tokens, top_probs = _native.top_k(logits, min(_TOP, logits.shape[1]))
    for i, text in enumerate(texts):
        engine.commit(text.sequence, [0])
        text.top_tokens.append(top_tokens[i].copy())
        text.top_probs.append(top_probs[i].copy())
        request = Request(
            prompt=(text.tokens[0],),
            max_new_tokens=1,
            temperature=temperature,
            seed=seed * _STREAMS + i,
            controls=(Temperature(temperature),),
        )
        text.tokens.append(draw(logits[i], text.tokens, request)[0])


def _joined(texts: list[_SelfText]) -> Trace:
    # A text's last token was never run, and predictions within its opening are not kept.
    kept = [text.tokens[-1 - len(text.top_tokens) : -1] for text in texts]
    sizes = [len(tokens) for tokens in kept]
    return Trace(
        np.concatenate([np.array(tokens, np.int32) for tokens in kept]),
        np.cumsum([0, *sizes[:-1]], dtype=np.int32),
        np.concatenate([np.stack(text.top_tokens) for text in texts]),
        np.concatenate([np.stack(text.top_probs) for text in texts]),
    )
