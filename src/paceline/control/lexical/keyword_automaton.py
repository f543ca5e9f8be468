"""Which keywords a text has had, as an automaton over tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from paceline.core import Tokens
from paceline.errors import RequestError

FAR = 1 << 30  # tokens; no text is so long
_MOST = 1 << 12  # states
_TOO_MANY = "the keywords are too many to be told apart; give fewer, or their order"
_State = tuple[bool, int, int]  # behind a boundary; begun keywords, by bits; which were found

Keyword = tuple[bytes, ...]  # the ways to write it


class KeywordAutomaton:
    """Reads tokens until each keyword has stood there as a whole word.

    Keywords are compared byte by byte, however the text is divided into tokens. Where one begins
    or ends with a letter, digit or byte of a longer character, none of these may stand beside it.
    State 0 is the end: all were found. Tokens that act alike are one kind.

    Args:
        keywords: at least one.
        ordered: each must come behind the one before it.
        pieces: what each token adds to the text, [V].
        stops: tokens that end it.

    Attributes:
        kind: int32 [V], the kind of each token; -1 for the stops.
        next: int32 [S, C], the state behind a token of each kind.
        ends: bool [S], the text may end here.
        steps: int32 [S], fewest tokens to where it may; `FAR` if there is no way.

    Raises:
        RequestError: there are too many to keep apart.
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
        if not ordered and 1 << len(keywords) > _MOST:
            raise RequestError(_TOO_MANY)
        self._bits = _Bits(keywords, ordered)
        self._number: dict[_State, int] = {(True, 0, self._bits.full): 0}
        table = self._table()
        self.ends = np.array([self._bits.ends(state) for state in self._number])
        self._lift(table, pieces, frozenset(stops))

    def start(self, before: bytes) -> int:
        """The state at the beginning of an output, `before` being the end of what it continues."""
        return self._number[(not before or not _joins(before[-1]), 0, 0)]

    def _table(self) -> Tokens:
        """The states, and the next by classes of bytes, [S, classes]."""
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
            if len(rows) > _MOST:
                raise RequestError(_TOO_MANY)
        return np.array(rows, np.int32)

    def _lift(self, table: Tokens, pieces: Sequence[bytes], stops: frozenset[int]) -> None:
        """From bytes to tokens."""
        self.kind = np.full(len(pieces), -1, np.int32)
        kinds: dict[bytes, int] = {}  # by the column of next states
        known: dict[bytes, int] = {}  # by the classes of a piece's bytes
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
            raise RequestError("the model has no token but those that end a text")
        self.next = np.ascontiguousarray(np.stack(columns, 1))
        self.steps = np.where(self.ends, 0, FAR).astype(np.int32)
        while True:
            nearer = np.minimum(self.steps, self.steps[self.next].min(1) + 1)
            if (nearer == self.steps).all():
                return
            self.steps = nearer


class _Bits:
    """Shift-and (Baeza-Yates and Gonnet 1992) over all ways to write all keywords.

    Bit i of the begun ones: the bytes up to place i of the ways, written one behind the other,
    are the last ones of the text.
    """

    def __init__(self, keywords: Sequence[Keyword], ordered: bool) -> None:
        self._ordered, self._count = ordered, len(keywords)
        self.full = len(keywords) if ordered else (1 << len(keywords)) - 1
        self._left: dict[int, int] = {}
        self._places = [0] * 256  # bits that a byte fits
        self._first = self._free = self._last = self._waits = 0
        self._own = [0] * len(keywords)  # the bits of each
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
        found: dict[tuple[int, bool], int] = {}
        for byte in range(256):
            found.setdefault((self._places[byte], _joins(byte)), byte)
        return found

    @property
    def representatives(self) -> list[int]:
        """One byte of each class; those of a class act alike."""
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
        """Whether all are found if the text ends here, which is a boundary."""
        _, begun, found = state
        return self._add(found, begun & self._waits) == self.full

    def _wanted(self, found: int) -> int:
        """The bits of those that may still be begun."""
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
    """Whether a byte is part of a word: a letter, a digit, or of a character beyond ASCII."""
    return byte >= 0x80 or chr(byte).isalnum()
