"""An automaton over tokens that tracks which keywords a text has contained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from paceline.core import Tokens
from paceline.errors import RequestError

FAR = 1 << 30  # tokens: more than any text has
_MAX_STATES = 1 << 12
_TOO_MANY = "there are too many keywords to track in any order; give fewer, or set ordered"
_State = tuple[bool, int, int]  # after a word boundary; begun keywords, as bits; found keywords

Keyword = tuple[bytes, ...]  # its accepted spellings


class KeywordAutomaton:
    """Reads tokens until every keyword has occurred as a whole word.

    Keywords are compared byte by byte, whatever the tokenisation. Where one begins or ends with a
    letter, a digit or a byte of a non-ASCII character, no such byte may be adjacent to it. State 0
    means that all were found. Tokens with the same transitions form one kind.

    Args:
        keywords: at least one.
        ordered: whether each must come after the one before it.
        pieces: bytes that each token adds to the text, [V].
        stops: tokens that end the text.

    Attributes:
        kind: int32 [V], the kind of each token; -1 for the stops.
        next: int32 [S, C], the state after a token of each kind.
        ends: bool [S], whether the text may end.
        steps: int32 [S], smallest number of tokens to a state where it may end; `FAR` if there is
            none.

    Raises:
        RequestError: there are too many keywords to track.
    """

    kind: Tokens
    next: Tokens
    ends: NDArray[np.bool_]
    steps: Tokens

    def __init__(
        self,
        keywords: Sequence[Keyword],
        ordered: bool,
        pieces: Sequence[bytes],
        stops: Iterable[int],
    ) -> None:
        if not ordered and 1 << len(keywords) > _MAX_STATES:
            raise RequestError(_TOO_MANY)
        self._bits = _Bits(keywords, ordered)
        self._number: dict[_State, int] = {(True, 0, self._bits.full): 0}
        table = self._table()
        self.ends = np.array([self._bits.ends(state) for state in self._number])
        self._lift(table, pieces, frozenset(stops))

    def start(self, before: bytes) -> int:
        """Return the initial state of an output that continues a text ending with `before`."""
        return self._number[(not before or not _joins(before[-1]), 0, 0)]

    def _table(self) -> Tokens:
        """Enumerate the states; return the next state by class of byte, [S, classes]."""
        classes = self._bits.representatives
        for begin in (True, False):
            self._number.setdefault((begin, 0, 0), len(self._number))
        rows: list[list[int]] = [[0] * len(classes)]
        todo = list(self._number)[1:]
        for state in todo:
            row = []
            for byte in classes:
                after = self._bits.step(state, byte)
                if after not in self._number:
                    self._number[after] = len(self._number)
                    todo.append(after)
                row.append(self._number[after])
            rows.append(row)
            if len(rows) > _MAX_STATES:
                raise RequestError(_TOO_MANY)
        return np.array(rows, np.int32)

    def _lift(self, table: Tokens, pieces: Sequence[bytes], stops: frozenset[int]) -> None:
        """Turn transitions of byte classes into those of tokens."""
        self.kind = np.full(len(pieces), -1, np.int32)
        kinds: dict[bytes, int] = {}  # index of a kind by its column of next states
        known: dict[bytes, int] = {}  # index of a kind by the classes of a piece's bytes
        columns: list[Tokens] = []
        for token, piece in enumerate(pieces):
            if token in stops:
                continue
            classes = piece.translate(self._bits.class_of)
            if classes not in known:
                column = np.arange(len(table), dtype=np.int32)
                for place in classes:
                    column = table[column, place]
                if column.tobytes() not in kinds:
                    kinds[column.tobytes()] = len(columns)
                    columns.append(column)
                known[classes] = kinds[column.tobytes()]
            self.kind[token] = known[classes]
        if not columns:
            raise RequestError("all tokens of the model end a text, so no keyword can be written")
        self.next = np.ascontiguousarray(np.stack(columns, 1))
        self.steps = np.where(self.ends, 0, FAR).astype(np.int32)
        while True:
            nearer = np.minimum(self.steps, self.steps[self.next].min(1) + 1)
            if (nearer == self.steps).all():
                return
            self.steps = nearer


class _Bits:
    """Shift-and matching (Baeza-Yates and Gonnet, 1992) of all spellings of all keywords.

    The spellings are concatenated. Bit i of `begun` is set if the text ends with the bytes of one
    spelling up to position i.
    """

    def __init__(self, keywords: Sequence[Keyword], ordered: bool) -> None:
        self._ordered, self._count = ordered, len(keywords)
        self.full = len(keywords) if ordered else (1 << len(keywords)) - 1
        self._left: dict[int, int] = {}
        self._places = [0] * 256  # positions at which a byte occurs, as bits
        self._first = self._free = self._last = self._waits = 0
        self._own = [0] * len(keywords)  # the bits of each keyword
        place = 0
        for index, ways in enumerate(keywords):
            for way in ways:
                self._first |= 1 << place
                self._free |= 0 if _joins(way[0]) else 1 << place
                for byte in way:
                    self._places[byte] |= 1 << place
                    self._own[index] |= 1 << place
                    place += 1
                self._last |= 1 << place - 1
                self._waits |= 1 << place - 1 if _joins(way[-1]) else 0

    @cached_property
    def _classes(self) -> dict[tuple[int, bool], int]:
        classes: dict[tuple[int, bool], int] = {}
        for byte in range(256):
            classes.setdefault((self._places[byte], _joins(byte)), byte)
        return classes

    @property
    def representatives(self) -> list[int]:
        """One byte of each class; bytes of a class have the same transitions."""
        return list(self._classes.values())

    @cached_property
    def class_of(self) -> bytes:
        """The class of each byte, [256]."""
        order = {key: place for place, key in enumerate(self._classes)}
        return bytes(order[(self._places[byte], _joins(byte))] for byte in range(256))

    def step(self, state: _State, byte: int) -> _State:
        boundary, begun, found = state
        if not _joins(byte):
            found = self._add(found, begun & self._waits)
        starts = self._first if boundary else self._free
        begun = (begun << 1 & ~self._first | starts) & self._places[byte] & self._wanted(found)
        found = self._add(found, begun & self._last & ~self._waits)
        if found == self.full:
            return (True, 0, self.full)
        return (not _joins(byte), begun & self._wanted(found), found)

    def ends(self, state: _State) -> bool:
        """Return whether all keywords are found if the text ends here, which is a boundary."""
        _, begun, found = state
        return self._add(found, begun & self._waits) == self.full

    def _wanted(self, found: int) -> int:
        """Return the bits of the keywords that are still to be found."""
        if self._ordered:
            return self._own[found] if found < self._count else 0
        if found not in self._left:
            left = (own for index, own in enumerate(self._own) if not found >> index & 1)
            self._left[found] = sum(left)
        return self._left[found]

    def _add(self, found: int, whole: int) -> int:
        if not whole:
            return found
        if self._ordered:
            return found + 1
        for index, own in enumerate(self._own):
            found |= (1 << index) if whole & own else 0
        return found


def _joins(byte: int) -> bool:
    """Return whether a byte belongs to a word: a letter, a digit, or non-ASCII."""
    return byte >= 0x80 or chr(byte).isalnum()
