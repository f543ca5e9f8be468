"""Constraints on the text itself: an automaton over its characters, asked token by token."""

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
_ROWS = 1 << 25  # bytes of the rows that are remembered of one method
_METHODS = 4  # whose rows are remembered for each model
_SAMPLES = 1 << 12  # characters that are looked at among those that half a one may become


class CharAutomaton(ABC):
    """Reads a text character by character.

    Attributes:
        start: the state before the first character.
        special: characters beyond ASCII that are not treated as others of their kind: letters,
            numbers, and what is neither.
    """

    start: State
    special: str = ""

    @abstractmethod
    def step(self, state: State, character: str) -> State | None:
        """The state behind one more character; None where it is forbidden."""

    @abstractmethod
    def whole(self, state: State) -> bool:
        """Whether the text may end here."""


class _Bytes:
    """An automaton over bytes: half a character is part of its state, what is none forbidden."""

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
        """Whether half a character can become one that is allowed."""
        special = [c for c in self._inner.special if c.encode().startswith(half)]
        tried = (*special, *_samples(half))
        return any(self._inner.step(own, character) is not None for character in tried)

    def whole(self, state: tuple[State, bytes]) -> bool:
        return not state[1] and self._inner.whole(state[0])


@lru_cache(maxsize=1 << 15)
def _samples(half: bytes) -> tuple[str, ...]:
    """One character of each kind among those that begin with `half`."""
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
    """Allows the tokens with which an automaton lives on, and the end where the text is whole.

    Special tokens add nothing to the text and change nothing. Pure: a history is followed from
    what it shares with the last one, so that questions may come in any order.

    Args:
        name: of the method, for messages.
        method: its settings; requests with the same share what they find out.
        automaton: over the output.
        request: where the output begins, and what ends it.
        vocabulary: the tokens.
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
        """Forbid what the automaton does."""
        state = self._follow(history)
        if state is None:
            return logits
        edited: Floats = np.where(self._row(state), logits, np.float32(-np.inf))
        return edited

    def can_contain(self, text: str) -> bool:
        """Whether a text may begin an output, and so stand anywhere; see `Judging`."""
        state: State | None = self._inner.start
        for character in text:
            state = None if state is None else self._inner.step(state, character)
        return state is not None

    def allows(self, history: list[int], tree: TokenTree) -> NDArray[np.bool_]:
        """Which nodes of a tree [N] can be drawn; see `Filtering`."""
        states = [self._follow(history)]
        kept = np.zeros(len(tree), bool)
        kept[0] = True
        for node in range(1, len(tree)):
            before, token = states[tree.parents[node]], int(tree.tokens[node])
            after = None
            if before is not None and token in self._stops:
                kept[node] = self._automaton.whole(before)  # nothing comes after it
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
        """Which tokens are allowed, bool [V]. Pieces with one beginning share its steps."""
        known = self._rows.get(state)
        if known is not None:
            return known
        row = np.zeros(self._size, bool)
        path = [state]
        for piece, same, tokens in self._sorted:
            if same >= len(path):
                continue  # what it shares with the one before is forbidden
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
        """The state at the end of a history; None behind a stop token, where a walk may look."""
        wanted = history[self._start :]
        same = shared(self._taken, wanted)
        del self._taken[same:], self._states[same + 1 :]
        for token in wanted[same:]:
            if token in self._stops:
                return None
            after = self._after(self._states[-1], token)
            if after is None:
                raise RequestError(
                    f"token {token} at position {self._start + len(self._taken)} is not what "
                    f"{self.name} allows; a control that forces tokens contradicts it"
                )
            self._taken.append(token)
            self._states.append(after)
        return self._states[-1]


_Rows = dict[State, NDArray[np.bool_]]
_all_rows: WeakKeyDictionary[Vocabulary, dict[Hashable, _Rows]] = WeakKeyDictionary()


def _rows(vocabulary: Vocabulary, key: Hashable) -> _Rows:
    """What is known of a method from earlier requests."""
    known = _all_rows.setdefault(vocabulary, {})
    if key not in known and len(known) >= _METHODS:
        del known[next(iter(known))]
    return known.setdefault(key, {})


_Sorted = list[tuple[bytes, int, NDArray[np.int64]]]
_known: WeakKeyDictionary[Vocabulary, _Sorted] = WeakKeyDictionary()


def _sorted(vocabulary: Vocabulary) -> _Sorted:
    """Every piece once, in order, with the bytes it shares with the one before and its tokens."""
    if vocabulary not in _known:
        tokens: dict[bytes, list[int]] = {}
        for token, piece in enumerate(vocabulary.pieces):
            tokens.setdefault(piece, []).append(token)
        found: _Sorted = []
        last = b""
        for piece in sorted(tokens):
            same = shared(list(last), list(piece))
            found.append((piece, same, np.array(tokens[piece], np.int64)))
            last = piece
        _known[vocabulary] = found
    return _known[vocabulary]
