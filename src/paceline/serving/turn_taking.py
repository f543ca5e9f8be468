"""An engine wrapper whose passes wait for their turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paceline.core import Floats, Tokens, TokenTree
from paceline.engines.base import Cached, Engine, Rows
from paceline.engines.view import View
from paceline.engines.wrapper import EngineWrapper
from paceline.errors import MemoryFullError

_CHUNK = 64  # prompt tokens in a pass


class TurnTakingEngine(EngineWrapper):
    """Runs each pass of a search when the worker lets it.

    Args:
        engine: runs the passes.
        turn: returns when a pass may run.
        relieve: see `SearchQueue`.
    """

    def __init__(
        self, inner: Engine, turn: Callable[[], None], relieve: Callable[[], bool]
    ) -> None:
        super().__init__(inner)
        self._turn, self._relieve = turn, relieve
        self._open: dict[int, Cached] = {}

    @property
    def held(self) -> int:
        """Return the pages that its sequences hold."""
        return len({page for each in self._open.values() for page in self.inner.pages(each)})

    def open(self) -> Cached:
        """Open an empty sequence and count its pages as held; see `Engine.open`."""
        return self._keep(super().open())

    def fork(self, sequence: Cached) -> Cached:
        """Fork a sequence and count its pages as held; see `Engine.fork`."""
        return self._keep(super().fork(sequence))

    def release(self, sequence: Cached) -> None:
        """Release a sequence; see `Engine.release`."""
        self._open.pop(id(sequence), None)
        super().release(sequence)

    def forward(
        self,
        batch: Sequence[tuple[Cached, TokenTree]],
        rows: Rows = "all",
        view: View | None = None,
    ) -> Floats:
        """Run a pass when it is its turn; see `Engine`."""
        return self._in_turn(lambda: self.inner.forward(batch, rows, view))

    def forward_mixed(self, sequence: Cached, tokens: Tokens, weights: Floats) -> Floats:
        """Run a chain of mixed nodes when it is the search's turn; see `Engine.forward_mixed`."""
        return self._in_turn(lambda: self.inner.forward_mixed(sequence, tokens, weights))

    def extend(
        self,
        sequence: Cached,
        tokens: Tokens,
        observe: Callable[[int, TokenTree, Floats], None] | None = None,
        chunk: int = 256,
    ) -> None:
        """Run a text in small parts, so that others do not wait long; see `Engine`."""
        super().extend(sequence, tokens, observe, min(chunk, _CHUNK))

    def _in_turn(self, run: Callable[[], Floats]) -> Floats:
        """Wait for the turn and run a pass, again whenever memory was freed for it."""
        while True:
            self._turn()
            try:
                return run()
            except MemoryFullError:
                if not self._relieve():
                    raise

    def _keep(self, sequence: Cached) -> Cached:
        self._open[id(sequence)] = sequence
        return sequence
