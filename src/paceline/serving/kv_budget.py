"""How much memory keys and values may take, so that a process keeps a promise, and who yields."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import ceil
from weakref import WeakSet

from paceline.decoding.session import Session
from paceline.drafters.base import Drafter, ModelBacked, engines_of
from paceline.engines.base import Engine
from paceline.engines.pages import PAGE, Memory
from paceline.engines.shared_limit import SharedLimit
from paceline.errors import RequestError
from paceline.machine import peak_bytes
from paceline.serving.prefix_cache import PrefixCache
from paceline.serving.scheduler import Scheduler

_SPARE = 64 * 2**20  # connections, drafters, parsers, and what the allocator wastes
_ROWS = 512  # nodes of a pass, as a rule at most; their logits are there twice
_FEWEST = 4  # pages
_BLOCKS = 9 / 8  # an engine's memory comes in blocks that others cannot have while they hold a page


def room(total: int, engine: Engine, others: Sequence[Engine] = ()) -> int:
    """Bytes for keys and values, those of past texts included, in a process of `total` bytes.

    What the process has held at most so far, the weights among it, is measured: call it when all
    models are loaded, those of drafters too. 64 MiB and, for each model, the logits of 512 nodes,
    twice, are left free.

    Args:
        total: promised.
        engine: runs the model.
        others: run drafts.

    Raises:
        RequestError: too little is left.
    """
    held = peak_bytes()
    spare = _SPARE + sum(map(_work, (engine, *others)))
    fewest = _FEWEST * engine.memory.page_bytes + sum(each.memory.page_bytes for each in others)
    left = total - held - spare
    if left < fewest:
        least = held + spare + fewest
        raise RequestError(
            f"{total / 1e6:.0f} MB of memory cannot hold it: the model takes {held / 1e6:.0f} MB, "
            f"work on it {spare / 1e6:.0f} MB, and {least / 1e6:.0f} MB is the least that can run"
        )
    return left


class KVBudget:
    """Keeps the keys and values of all engines that a worker uses under one limit.

    Every engine takes pages from the same bytes. When they run out those yield who can wait: first
    caches of drafters that nobody uses, then texts of the past, then the drafts of running requests
    from the least important one on, which then guess nothing, and last requests themselves.
    Drafts yield for models and guides only. Without a promise only the model's pages are limited.

    Args:
        engine: runs the model.
        scheduler: told how many positions there are.
        memory: most bytes of keys and values; None takes a context for each place.
        prefix_cache: share of it that texts of the past may fill.

    Attributes:
        idle: lists the drafters that no request uses.

    Raises:
        RequestError: it cannot hold one request.
    """

    def __init__(
        self, engine: Engine, scheduler: Scheduler, memory: int | None, prefix_cache: float
    ) -> None:
        self.engine, self.scheduler = engine, scheduler
        page = engine.memory.page_bytes
        least = scheduler.max_running * Memory.pages(engine.config.context) + 2
        total = least * page if memory is None else memory
        if total // page < _FEWEST:
            raise RequestError(
                f"{total} bytes of memory hold {total // page} pages of keys and values, expected "
                f"{_FEWEST} at least: {_FEWEST * page} bytes"
            )
        self._promised = memory is not None
        self.limit = SharedLimit(engine, total)
        self.prefix_cache = PrefixCache(engine, int(prefix_cache * (total // page)))
        self.idle: Callable[[], Iterable[Drafter]] = tuple
        self._drafts = WeakSet[Engine]()
        scheduler.capacity = self._capacity(total)

    def know(self, engines: Iterable[Engine], drafts: bool = False, loaded: bool = False) -> None:
        """Let further engines share the limit; they must hold nothing.

        Args:
            engines: other ones, or known ones.
            drafts: they can do without.
            loaded: they were there when the memory was settled; else what they take counts, too.

        Raises:
            PacelineError: that leaves too little memory, or one does not count its own.
        """
        for engine in engines:
            if engine is self.engine:
                continue
            if not self._promised:
                engine.shared = engine.kv_limit = None  # those of an earlier worker
                continue
            if engine not in self.limit:
                self._add(engine, loaded)
            if drafts:
                self._drafts.add(engine)

    def affords(self, engines: Iterable[Engine]) -> bool:
        """Whether there is room for the weights of engines like these, and a page for each."""
        if not self._promised:
            return True
        try:
            needed = sum(_taken(each) + each.memory.page_bytes for each in engines)
        except RequestError:  # nobody knows
            return False
        return self._spares(needed)

    def cost(self, run: Session) -> float:
        """Positions that a token of a request takes, those for its guides included."""
        page, length = self.engine.memory.page_bytes, len(run.text)
        return 1.0 + sum(each.memory.page_bytes / page for each, _ in self._beside(run, length))

    def most(self, run: Session) -> int:
        """Positions that a request may come to take, those for its guides included."""
        own, page = len(run.request.prompt) + run.room + 1, self.engine.memory.page_bytes
        beside = self._beside(run, own)
        blocks = 1.0 if all(engine is self.engine for engine, _ in beside) else _BLOCKS
        parts = [(size + PAGE) * engine.memory.page_bytes / page for engine, size in beside]
        return ceil(blocks * (own + sum(parts)))

    def free(self, runs: Sequence[Session]) -> int:
        """Positions of memory that running requests can have, if all yield who can wait."""
        held, copied = set[int](), 0
        for run in runs:
            if run.sequence is None:
                continue
            own = self.engine.pages(run.sequence)
            held.update(own)
            # A page that is not full and shared is copied before it is written to.
            copied += run.sequence.length % PAGE > 0 and self.prefix_cache.holds(own[-1])
        unused = self.limit.free(self.engine, self._drafts)
        pages = unused // self.engine.memory.page_bytes + self.prefix_cache.idle(held) - copied
        return (max(pages, 2) if len(runs) < 2 else pages) * PAGE  # one alone always fits

    def make_room(self, turns: Sequence[tuple[Session, int, Drafter | None]]) -> None:
        """Before a pass: let those yield who can wait, so that drafters find room, too.

        Args:
            turns: requests, nodes that each may run, and the drafter that may use memory for it.
        """
        pages = drafts = 0
        for run, more, drafter in turns:
            length = run.sequence.length if run.sequence else 0
            copied = length % PAGE > 0  # the last page may be shared
            pages += Memory.pages(length + more) - Memory.pages(length) + copied
            engines = engines_of(drafter) if drafter is not None and self._drafts else ()
            drafts += (Memory.pages(more) + 1) * sum(each.memory.page_bytes for each in engines)
        self.limit.promised = pages
        page, there = self.engine.memory.page_bytes, [each.memory for each in self._drafts]
        drafts -= sum((own.reserved - own.used) * own.page_bytes for own in there)
        drafts = max(drafts, 0)
        while (lack := pages * page + drafts - self.limit.free(self.engine)) > 0:
            if not self.ease(-(-lack // page)):
                return

    def ease(self, pages: int) -> bool:
        """Let those yield who can wait, for so many pages of the model; whether one did."""
        if self._drafts:
            before = self.limit.used
            for drafter in self.idle():
                if isinstance(drafter, ModelBacked):
                    drafter.release()
            if self.limit.used < before:
                return True
        return self.prefix_cache.shrink(pages) > 0

    def park(self, drafter: Drafter) -> bool:
        """Let a running request's drafter give its keys and values back; whether it had any."""
        if not isinstance(drafter, ModelBacked) or self._drafts.isdisjoint(drafter.engines):
            return False
        before = self.limit.used
        drafter.release()
        return self.limit.used < before

    def _beside(self, run: Session, length: int) -> list[tuple[Engine, int]]:
        """Engines under the limit that guides use, and their positions for so many tokens."""
        found = [each for guide in run.guides for each in guide.positions(length)]
        return [(engine, size) for engine, size in found if size > 0 and engine in self.limit]

    def _add(self, engine: Engine, loaded: bool) -> None:
        taken = 0 if loaded else _taken(engine)
        needed = taken + engine.memory.page_bytes
        if not self._spares(needed):
            raise RequestError(
                f"one more model needs {needed / 1e6:.1f} MB of memory, more than can be spared; "
                "use one that is open, or ask when there is less to do"
            )
        self.limit.add(engine, taken)
        self.scheduler.capacity = self._capacity(self.limit.total - self.limit.least)

    def _spares(self, needed: int) -> bool:
        """Whether so many bytes can be had for ever; those yield who can wait."""
        owed = max((job.most for job in self.scheduler.jobs.values()), default=1)
        page = self.engine.memory.page_bytes
        left = self.limit.total - self.limit.least - needed
        if left < _FEWEST * page or self._capacity(left) < owed:
            return False
        while (lack := needed - self.limit.free(self.engine)) > 0:
            if not self.ease(-(-lack // page)):
                return False
        return True

    def _capacity(self, total: int) -> int:
        """Positions for requests; besides, each has a page that is not full, or is shared."""
        return max(total // self.engine.memory.page_bytes - 2, 1) * PAGE


def _work(engine: Engine) -> int:
    """Bytes for the logits of its passes."""
    return 2 * _ROWS * 4 * engine.config.vocab_size


def _taken(engine: Engine) -> int:
    """Bytes of an engine besides keys and values: its matrices, and work on it.

    Raises:
        RequestError: it does not tell.
    """
    weights = engine.weight_bytes
    if weights is None:
        raise RequestError(
            f"the {engine.name} engine does not tell how much memory its weights take; with a "
            "limit of memory use native, or models that are open before"
        )
    return weights + _work(engine)
