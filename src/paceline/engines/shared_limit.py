"""One limit of memory for the keys and values of several engines."""

from __future__ import annotations

from collections.abc import Container
from contextlib import suppress
from threading import Lock
from weakref import WeakKeyDictionary

from paceline.engines.base import Engine
from paceline.errors import MethodError


class SharedLimit:
    """Leases the `kv_limit` of several engines from one pool of bytes.

    The sum of the limits never exceeds `total`, so neither do the pages held. An engine whose pass
    finds no page calls `lend` by itself, and raises `MemoryFullError` only if that fails.
    Thread-safe.

    Args:
        first: has priority: the others leave it the pages that it is `promised`.
        total: bytes.

    Attributes:
        promised: pages reserved for `first` besides those it uses, set before each pass.

    Raises:
        MethodError: `first` does not count its memory, or uses more.
    """

    def __init__(self, first: Engine, total: int) -> None:
        self.first, self.promised = first, 0
        self._total = total
        self._weights: WeakKeyDictionary[Engine, int] = WeakKeyDictionary({first: 0})
        self._guard = Lock()
        first.kv_limit = total
        first.shared = self

    def __contains__(self, engine: Engine) -> bool:
        return engine in self._weights

    @property
    def total(self) -> int:
        """Bytes for keys and values: without the weights of engines that were added later."""
        return self._total - sum(self._weights.values())

    @property
    def least(self) -> int:
        """Bytes that the engines other than the first always keep: a page each."""
        return sum(each.memory.page_bytes for each in self._weights if each is not self.first)

    @property
    def used(self) -> int:
        """Bytes of the pages in use."""
        memories = [engine.memory for engine in self._weights]
        return sum(memory.used * memory.page_bytes for memory in memories)

    def add(self, engine: Engine, weights: int = 0) -> None:
        """Add an engine to the limit. It must hold nothing yet.

        Args:
            engine: another one.
            weights: bytes of its weights, if they were loaded after `total` was set.

        Raises:
            MethodError: it does not count its memory, or there is no room for its first page.
        """
        size = engine.memory.page_bytes
        with self._guard:
            for other in self._weights:
                _withdraw(other, self._promised(other))
            if self._unlent() < weights + size:
                raise MethodError(
                    f"{weights + size} bytes of memory are needed for one more model, and there "
                    f"are {max(self._unlent(), 0)}"
                )
            engine.kv_limit = size
            engine.shared = self
            self._weights[engine] = weights

    def lend(self, engine: Engine, pages: int) -> bool:
        """Raise an engine's limit by up to `pages` pages; return whether by any."""
        with self._guard:
            memory = engine.memory
            if memory.limit is None or engine not in self._weights:
                return False
            # More than requested, so that pages come from the system in blocks.
            requested = max(pages, memory.limit // 8)
            if self._free(engine) < requested * memory.page_bytes:
                for other in self._weights:
                    if other is not engine:
                        _withdraw(other, self._promised(other))
            lent = min(requested, self._free(engine) // memory.page_bytes)
            if lent > 0:
                engine.kv_limit = (memory.limit + lent) * memory.page_bytes
            return lent > 0

    def free(self, engine: Engine, yielding: Container[Engine] = ()) -> int:
        """Return the bytes that an engine can take if those in `yielding` release all pages."""
        left, own = self.total, engine.memory
        for other in self._weights:
            if other is not engine:
                memory = other.memory
                left -= (1 if other in yielding else max(memory.reserved, 1)) * memory.page_bytes
        return left - own.used * own.page_bytes

    def _promised(self, engine: Engine) -> int:
        return self.promised if engine is self.first else 0

    def _unlent(self) -> int:
        return self.total - sum(engine.kv_limit or 0 for engine in self._weights)

    def _free(self, engine: Engine) -> int:
        """Return the bytes that are neither lent nor promised to another engine."""
        unlent, memory = self._unlent(), self.first.memory
        if engine is self.first or memory.free is None:
            return unlent
        return unlent - max(self.promised - memory.free, 0) * memory.page_bytes


def _withdraw(engine: Engine, kept: int) -> None:
    """Lower an engine's limit to the pages it holds and at most `kept` more."""
    memory = engine.memory
    if memory.limit is None:
        return
    least = min(max(memory.used + kept, 1), memory.limit)
    try:
        engine.kv_limit = least * memory.page_bytes
    except MethodError:  # it holds blocks that are not full; the empty ones are gone by now
        held = max(least, min(engine.memory.reserved, memory.limit))
        with suppress(MethodError):  # a thread took more in the meantime
            engine.kv_limit = held * memory.page_bytes
