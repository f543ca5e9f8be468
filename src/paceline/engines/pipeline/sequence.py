"""What a pipeline keeps of a sequence: enough to compute the caches of a lost node again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.engines.base import Cached
from paceline.engines.pipeline.stage import StageEntry


class KeptRows:
    """Rows that grow at their end; forks share what they have in common.

    Pieces are joined where the last one is as long as the one before, so that there are few, and
    a row is copied a few times only.
    """

    def __init__(self, pieces: list[NDArray[Any]] | None = None) -> None:
        self._pieces = pieces or []

    def __len__(self) -> int:
        return sum(map(len, self._pieces))

    def append(self, rows: NDArray[Any]) -> None:
        """Add rows [A, ...] at the end; the array must not change afterwards."""
        pieces = self._pieces
        pieces.append(rows)
        while len(pieces) > 1 and len(pieces[-1]) >= len(pieces[-2]):
            last = pieces.pop()
            pieces[-1] = np.concatenate([pieces[-1], last])

    def truncate(self, length: int) -> None:
        """Drop the rows from `length` on."""
        kept, left = [], length
        for piece in self._pieces:
            if left <= 0:
                break
            kept.append(piece[:left])
            left -= len(piece)
        self._pieces = kept

    def fork(self) -> KeptRows:
        """Return a copy that shares the rows."""
        return KeptRows(list(self._pieces))

    def rows(self) -> NDArray[Any]:
        """Return all rows in one array."""
        if len(self._pieces) > 1:
            self._pieces = [np.concatenate(self._pieces)]
        return self._pieces[0] if self._pieces else np.empty(0, np.int32)


@dataclass(eq=False)
class PipelineSequence:
    """One sequence of a pipeline.

    Attributes:
        key: its number on every node.
        local: the sequence of the part in this process.
        tokens: int32 [S], those committed, which the first node was given.
        states: for each node behind the first, the hidden states [S, hidden] that it was given.
        pending: what the nodes were given in the last pass, which is not committed: its tree of N
            nodes, and states [N, hidden] of each node behind the first.
        flight: the pass that was begun with it and is not finished.
        released: its memory was given back.
    """

    key: int
    local: Cached
    tokens: KeptRows = field(default_factory=KeptRows)
    states: list[KeptRows] = field(default_factory=list)
    pending: tuple[StageEntry, list[Floats]] | None = None
    flight: object | None = None
    released: bool = False

    @property
    def length(self) -> int:
        """Positions that are committed."""
        return self.local.length

    def commit(self, path: NDArray[np.int32]) -> None:
        """Keep the inputs of the nodes [A] of the last pass."""
        if self.pending is None:
            return
        entry, states = self.pending
        self.tokens.append(entry.tokens[path])
        for kept, rows in zip(self.states, states, strict=True):
            kept.append(rows[path])
        self.pending = None

    def truncate(self, length: int) -> None:
        """Drop the inputs from `length` on."""
        self.pending = None
        for kept in (self.tokens, *self.states):
            kept.truncate(length)

    def fork(self, key: int, local: Cached) -> PipelineSequence:
        """Return a sequence with the same inputs."""
        return PipelineSequence(
            key, local, self.tokens.fork(), [kept.fork() for kept in self.states]
        )
