"""Constraints on text: an automaton over characters, applied token by token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from functools import lru_cache
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from paceline.control.base import shared
from paceline.core import Floats, Request, TokenTree
from paceline.errors import RequestError
from paceline.models.vocabulary import Vocabulary

State = Hashable
_ROWS = 1 << 25  # bytes of cached rows of one method
_METHODS = 4  # methods with cached rows for each model
_SAMPLES = 1 << 12  # characters that are tried among those that an incomplete one may become


class CharAutomaton(ABC):
    """Reads a text character by character.

    Attributes:
        start: the state before the first character.
        special: characters beyond ASCII that `step` treats unlike others of their kind; the kinds
            are letters, numbers and all others.
    """

    start: State
    special: str = ""

    @abstractmethod
    def step(self, state: State, character: str) -> State | None:
        """Return the state after one more character; None if it is forbidden."""

    @abstractmethod
    def whole(self, state: State) -> bool:
        """Return whether the text may end in this state."""


class _Bytes:
    """A character automaton over UTF-8 bytes: an incomplete character is part of the state."""

    def __init__(self, inner: CharAutomaton) -> None:
        self._inner = inner
        self.start: tuple[State, bytes] = (inner.start, b"")

    def step(self, state: tuple[State, bytes], byte: int) -> tuple[State, bytes] | None:
        own, half = state
        if half or byte >= 0x80:
            half += bytes([byte])
            try:
                text = half.decode()
            except UnicodeDecodeError as error:
                hopeful = error.reason == "unexpected end of data" and self._hopeful(own, half)
                return (own, half) if hopeful else None
        else:
            text = chr(byte)
        after = self._inner.step(own, text)
        return None if after is None else (after, b"")

    def _hopeful(self, own: State, half: bytes) -> bool:
        """Return whether an incomplete character can become one that is allowed."""
        special = [c for c in self._inner.special if c.encode().startswith(half)]
        tried = (*special, *_samples(half))
        return any(self._inner.step(own, character) is not None for character in tried)

    def whole(self, state: tuple[State, bytes]) -> bool:
        return not state[1] and self._inner.whole(state[0])


@lru_cache(maxsize=1 << 15)
def _samples(half: bytes) -> tuple[str, ...]:
    """Return one character of each kind among those whose bytes begin with `half`."""
    size = 2 + (half[0] >= 0xE0) + (half[0] >= 0xF0)
    left = size - len(half)
    first = half[0] & (0x7F >> size)
    for byte in half[1:]:
        first = first << 6 | byte & 0x3F
    kinds: dict[tuple[bool, bool], str] = {}
    lowest = (0x80, 0x800, 0x10000)[size - 2]
    begin, end = max(first << 6 * left, lowest), min(first + 1 << 6 * left, 0x110000)
    for code in range(begin, end, max(1, (end - begin) // _SAMPLES)):
        if not 0xD800 <= code < 0xE000:
            character = chr(code)
            kinds.setdefault((character.isalpha(), character.isnumeric()), character)
    return tuple(kinds.values())


class TextControl:
    """Allows the tokens that an automaton accepts, and stop tokens where the text may end.

    Special tokens add no text and leave the state as it is. Pure: a history is followed from its
    common prefix with the last one, so that calls may come in any order.

    Args:
        name: of the method, for messages.
        method: its settings; requests with the same settings share cached rows.
        automaton: over the output's characters.
        request: where the output begins, and what ends it.
        vocabulary: the model's tokens and their text.
    """

    def __init__(
        self,
        name: str,
        method: Hashable,
        automaton: CharAutomaton,
        request: Request,
        vocabulary: Vocabulary,
    ) -> None:
        self.name, self._inner, self._automaton = name, automaton, _Bytes(automaton)
        self._start, self._size = len(request.prompt), vocabulary.size
        self._stops = request.stop_tokens
        self._pieces, self._sorted = vocabulary.pieces, _sorted(vocabulary)
        self._taken: list[int] = []
        self._states = [self._automaton.start]
        self._rows = _rows(vocabulary, (method, request.stop_tokens))

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """Forbid the tokens that the automaton rejects."""
        state = self._follow(history)
        if state is None:
            return logits
        edited: Floats = np.where(self._row(state), logits, np.float32(-np.inf))
        return edited

    def can_contain(self, text: str) -> bool:
        """Return whether `text` may begin an output, and so occur anywhere; see `RejectsText`."""
        state: State | None = self._inner.start
        for character in text:
            state = None if state is None else self._inner.step(state, character)
        return state is not None

    def allows(self, history: list[int], tree: TokenTree) -> NDArray[np.bool_]:
        """Return which nodes of a tree can be drawn, bool [N]; see `FiltersDrafts`."""
        states = [self._follow(history)]
        kept = np.zeros(len(tree), bool)
        kept[0] = True
        for node in range(1, len(tree)):
            before, token = states[tree.parents[node]], int(tree.tokens[node])
            after = None
            if before is not None and token in self._stops:
                kept[node] = self._automaton.whole(before)  # nothing follows a stop token
            elif before is not None:
                after = self._after(before, token)
                kept[node] = after is not None
            states.append(after)
        return kept

    def _after(self, state: tuple[State, bytes], token: int) -> tuple[State, bytes] | None:
        after: tuple[State, bytes] | None = state
        for byte in self._pieces[token]:
            if after is None:
                break
            after = self._automaton.step(after, byte)
        return after

    def _row(self, state: tuple[State, bytes]) -> NDArray[np.bool_]:
        """Return the allowed tokens, bool [V]. Tokens with a common prefix share its steps."""
        known = self._rows.get(state)
        if known is not None:
            return known
        row = np.zeros(self._size, bool)
        path = [state]
        for piece, same, tokens in self._sorted:
            if same >= len(path):
                continue  # its common prefix with the piece before is forbidden
            del path[same + 1 :]
            for byte in piece[same:]:
                after = self._automaton.step(path[-1], byte)
                if after is None:
                    break
                path.append(after)
            else:
                row[tokens] = True
        row[list(self._stops)] = self._automaton.whole(state)
        if len(self._rows) * self._size >= _ROWS:
            del self._rows[next(iter(self._rows))]
        self._rows[state] = row
        return row

    def _follow(self, history: list[int]) -> tuple[State, bytes] | None:
        """Return the state at the end of a history; None after a stop token."""
        output = history[self._start :]
        same = shared(self._taken, output)
        del self._taken[same:], self._states[same + 1 :]
        for token in output[same:]:
            if token in self._stops:
                return None
            after = self._after(self._states[-1], token)
            if after is None:
                raise RequestError(
                    f"token {token} at position {self._start + len(self._taken)} is not "
                    f"allowed by {self.name}; a control that forces tokens contradicts it"
                )
            self._taken.append(token)
            self._states.append(after)
        return self._states[-1]


_Rows = dict[State, NDArray[np.bool_]]
_all_rows: WeakKeyDictionary[Vocabulary, dict[Hashable, _Rows]] = WeakKeyDictionary()


def _rows(vocabulary: Vocabulary, key: Hashable) -> _Rows:
    """Return the cached rows of a method."""
    known = _all_rows.setdefault(vocabulary, {})
    if key not in known and len(known) >= _METHODS:
        del known[next(iter(known))]
    return known.setdefault(key, {})


_Sorted = list[tuple[bytes, int, NDArray[np.int64]]]
_known: WeakKeyDictionary[Vocabulary, _Sorted] = WeakKeyDictionary()


def _sorted(vocabulary: Vocabulary) -> _Sorted:
    """Return the distinct pieces, sorted, with their common prefix's length and their tokens.

    The prefix is that with the piece before.
    """
    if vocabulary not in _known:
        tokens: dict[bytes, list[int]] = {}
        for token, piece in enumerate(vocabulary.pieces):
            tokens.setdefault(piece, []).append(token)
        entries: _Sorted = []
        last = b""
        for piece in sorted(tokens):
            same = shared(list(last), list(piece))
            entries.append((piece, same, np.array(tokens[piece], np.int64)))
            last = piece
        _known[vocabulary] = entries
    return _known[vocabulary]
