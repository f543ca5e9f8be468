"""An engine whose passes wait for their turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from numpy.typing import ArrayLike

from paceline.core import Floats, Tokens, TokenTree
from paceline.engines.base import Cached, Engine, Rows
from paceline.engines.pages import Memory
from paceline.engines.view import View
from paceline.errors import MemoryFullError

_PART = 64  # tokens of a prompt in a pass


class TurnTakingEngine(Engine):
    """See the module's text.

    Args:
        engine: runs them.
        turn: returns when it is theirs.
        relieve: as of `Searches`.
    """

    def __init__(
        self, engine: Engine, turn: Callable[[], None], relieve: Callable[[], bool]
    ) -> None:
        self._engine, self._turn, self._relieve = engine, turn, relieve
        self.name, self.config, self.format = engine.name, engine.config, engine.format
        self.kv_format, self.invariant = engine.kv_format, engine.invariant
        self.tolerance, self.abilities = engine.tolerance, engine.abilities
        self._open: dict[int, Cached] = {}

    @property
    def held(self) -> int:
        """Pages of its sequences."""
        return len({page for each in self._open.values() for page in self._engine.pages(each)})

    @property
    def memory(self) -> Memory:
        """See `Engine`."""
        return self._engine.memory

    def open(self) -> Cached:
        """See `Engine`."""
        return self._keep(self._engine.open())

    def fork(self, sequence: Cached) -> Cached:
        """See `Engine`."""
        return self._keep(self._engine.fork(sequence))

    def release(self, sequence: Cached) -> None:
        """See `Engine`."""
        self._open.pop(id(sequence), None)
        self._engine.release(sequence)

    def forward(
        self,
        batch: Sequence[tuple[Cached, TokenTree]],
        rows: Rows = "all",
        view: View | None = None,
    ) -> Floats:
        """See `Engine`; when it is its turn."""
        while True:
            self._turn()
            try:
                return self._engine.forward(batch, rows, view)
            except MemoryFullError:
                if not self._relieve():
                    raise

    def extend(
        self,
        sequence: Cached,
        tokens: Tokens,
        observe: Callable[[int, TokenTree, Floats], None] | None = None,
        chunk: int = 256,
    ) -> None:
        """See `Engine`; in small parts, so that others do not wait long."""
        super().extend(sequence, tokens, observe, min(chunk, _PART))

    def hidden(self) -> Floats:
        """See `Engine`."""
        return self._engine.hidden()

    def commit(self, sequence: Cached, path: ArrayLike) -> None:
        """See `Engine`."""
        self._engine.commit(sequence, path)

    def truncate(self, sequence: Cached, length: int) -> None:
        """See `Engine`."""
        self._engine.truncate(sequence, length)

    def _keep(self, sequence: Cached) -> Cached:
        self._open[id(sequence)] = sequence
        return sequence
