"""Text that a model generates by itself, with its top-k predictions at every token."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from itertools import count

import numpy as np
from numpy.typing import NDArray

from paceline import _native
from paceline.control.temperature import Temperature
from paceline.core import Request, Tokens, TokenTree
from paceline.decoding.walk import draw
from paceline.engines.base import Cached, Engine
from paceline.engines.view import View
from paceline.errors import RequestError
from paceline.models.trace import Trace

_TOP = 16  # successors kept per token; no drafter uses more by default
_LENGTH = 400  # default maximum of tokens in one text
_STREAMS = 16  # texts written at once, as a pass over many sequences costs little more than one
# Texts written at once, and tokens of a start in a pass; where passes must be short, few.
_LONG, _SHORT = (_STREAMS, 256), (4, 16)


class _SelfText:
    """One running text."""

    def __init__(self, sequence: Cached, tokens: list[int]) -> None:
        self.sequence, self.tokens = sequence, tokens
        self.top_tokens: list[np.ndarray] = []
        self.top_probs: list[np.ndarray] = []
        self.hidden: list[np.ndarray] = []


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
    starts = bare_starts(opening, engine.config.vocab_size, seed)
    length = min(longest, engine.config.context - 1)
    writer = _Writer(engine, stop_tokens, temperature, seed)
    steps = writer.writing(starts, lambda text, start: text > length)
    return _joined(writer.take(tokens, steps, progress))


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
    writer = _Writer(engine, stop_tokens, temperature, seed)
    return _joined(writer.take(tokens, writer.answering(prompts, longest), progress))


def answers_with_hidden(
    engine: Engine,
    tokens: int,
    prompts: Iterable[list[int]],
    stop_tokens: frozenset[int],
    temperature: float = 0.7,
    seed: int = 0,
    progress: Callable[[int], None] = lambda count: None,
    longest: int = _LENGTH,
    layers: Tokens | None = None,
) -> tuple[Trace, NDArray[np.float16]]:
    """Return what `self_answers` does, and the hidden states behind its tokens.

    With `layers`, increasing indices, the states are those behind these layers alone, which are run
    once more for them.

    Returns:
        the trace, and float16 [T, hidden size], one row for each of its tokens, after the model's
        last norm; values beyond the type's range are cut.
    """
    writer = _Writer(engine, stop_tokens, temperature, seed, hidden=True)
    if layers is not None:
        writer.view = View(layers=layers, tokens=np.zeros(1, np.int32))
    texts = writer.take(tokens, writer.answering(prompts, longest), progress)
    return _joined(texts), np.stack([row for text in texts for row in text.hidden])


def answer_steps(
    engine: Engine,
    prompts: Iterable[list[int]],
    stop_tokens: frozenset[int],
    temperature: float = 0.7,
    seed: int = 0,
    longest: int = _LENGTH,
) -> Generator[Trace | None, None, None]:
    """Let a model answer prompts without end, four at once, and give way after each short pass.

    Closing the iterator releases the sequences; answers that are not finished are lost.

    Args:
        engine: runs the model.
        prompts: token ids of each; a sequence is begun again at its end.
        stop_tokens: end an answer.
        temperature: of the draws.
        seed: keys the draws.
        longest: maximum tokens of one answer.

    Yields:
        after each pass the answers that ended with it, or None.

    Raises:
        RequestError: no prompt fits.
        MemoryFullError: there is no memory for the sequences.
    """
    writer = _Writer(engine, stop_tokens, temperature, seed, short=True)
    with closing(writer.answering(prompts, longest)) as steps:
        for ended in steps:
            yield _joined(ended) if ended else None


def bare_starts(opening: list[int], vocab_size: int, seed: int) -> Iterator[list[int]]:
    """Yield the starts of texts without a prompt, without end; see `selftext`."""
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


_Steps = Generator[list[_SelfText], None, None]  # texts that ended with each pass


class _Writer:
    """Writes texts, several at once."""

    def __init__(
        self,
        engine: Engine,
        stop_tokens: frozenset[int],
        temperature: float,
        seed: int,
        hidden: bool = False,
        short: bool = False,
    ) -> None:
        if not 0 < temperature < np.inf:
            raise RequestError(f"the temperature is {temperature}, expected more than 0")
        self._engine, self._stop_tokens, self._temperature = engine, stop_tokens, temperature
        self._seed, self._hidden, self._short = seed, hidden, short
        self._streams, self._chunk = _SHORT if short else _LONG
        self._running: list[_SelfText] = []
        self.view: View | None = None  # whose states are kept; None: those of the whole model

    def answering(self, prompts: Iterable[list[int]], longest: int) -> _Steps:
        """Answer prompts, see `self_answers`; yield the answers that ended after each pass."""
        context = self._engine.config.context

        def is_long(text: int, start: int) -> bool:
            return text - start >= longest or text >= context

        return self.writing(_fitting(prompts, context), is_long)

    def writing(self, starts: Iterator[list[int]], is_long: Callable[[int, int], bool]) -> _Steps:
        """Write texts behind `starts`; yield those that ended after each pass that writes.

        Where passes must be short, those that read a start yield, too: nothing.

        `is_long` tells by the lengths of a text and of its start whether to cut it.
        """
        running, opened = self._running, 0
        try:
            while True:
                while len(running) < self._streams:
                    # Predictions within the start are not kept: the text begins at its root.
                    start = list(next(starts))
                    text = _SelfText(self._engine.open(), start)
                    running.append(text)
                    opened += 1
                    before = np.array(start[:-1], np.int32)
                    for begin in range(0, len(before), self._chunk):
                        self._engine.extend(text.sequence, before[begin : begin + self._chunk])
                        if self._short:
                            yield []
                self._write_token(running, self._seed + opened)
                ended = []
                for text in list(running):
                    begun = len(text.tokens) - len(text.top_tokens)
                    if text.tokens[-1] in self._stop_tokens or is_long(len(text.tokens), begun):
                        running.remove(text)
                        self._engine.release(text.sequence)
                        ended.append(text)
                yield ended
        finally:
            while running:
                self._engine.release(running.pop().sequence)

    def take(self, tokens: int, steps: _Steps, progress: Callable[[int], None]) -> list[_SelfText]:
        """Return `tokens` tokens of texts or a few more; running texts are cut there."""
        if tokens < 1:
            raise RequestError(f"tokens is {tokens}, expected 1 or more")
        done: list[_SelfText] = []
        written = 0
        with closing(steps):
            for ended in steps:
                done += ended
                count = len(self._running) + len(ended)
                written += count
                progress(count)
                if written >= tokens:
                    done += self._running
                    break
        return done

    def _write_token(self, texts: list[_SelfText], seed: int) -> None:
        """Write one more token of each text."""
        engine = self._engine
        batch = [(text.sequence, TokenTree.root(text.tokens[-1])) for text in texts]
        if self.view is not None:
            engine.forward(batch, view=self.view)
            self._keep_states(texts)
        logits = engine.forward(batch)
        if self._hidden and self.view is None:
            self._keep_states(texts)
        top_tokens, top_probs = _native.top_k(logits, min(_TOP, logits.shape[1]))
        for i, text in enumerate(texts):
            engine.commit(text.sequence, [0])
            text.top_tokens.append(top_tokens[i].copy())
            text.top_probs.append(top_probs[i].copy())
            request = Request(
                prompt=(text.tokens[0],),
                max_new_tokens=1,
                temperature=self._temperature,
                seed=seed * _STREAMS + i,
                controls=(Temperature(self._temperature),),
            )
            text.tokens.append(draw(logits[i], text.tokens, request)[0])

    def _keep_states(self, texts: list[_SelfText]) -> None:
        """Keep the hidden states of the last pass; values beyond the type's range are cut."""
        limit = np.finfo(np.float16).max
        for text, row in zip(texts, self._engine.hidden(), strict=True):
            text.hidden.append(row.clip(-limit, limit).astype(np.float16))


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
