"""Divides the process's memory limit among KV caches, and decides what to evict first."""

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
from paceline.machine import free_bytes, peak_bytes
from paceline.serving.prefix_cache import PrefixCache
from paceline.serving.scheduler import Scheduler

DEFAULT_SHARE = 0.25
_SPARE = 64 * 2**20  # bytes: connections, drafters, parsers, fragmentation
_ROWS = 512  # usual maximum of nodes in a pass; their logits exist twice
_MIN_PAGES = 4
_BLOCK_OVERHEAD = 9 / 8  # memory is allocated in blocks; one used page keeps a block from others


def room(total: int, engine: Engine, others: Sequence[Engine] = ()) -> int:
    """Return how many bytes keys and values may take in a process of `total` bytes.

    Cached prefixes are included. The peak memory of the process so far, weights included, is
    measured: call this after all models, those of drafters too, have been loaded. 64 MiB and, for
    each model, twice the logits of 512 nodes are left free.

    Args:
        total: limit of the process, in bytes.
        engine: runs the model.
        others: run draft and guide models.

    Raises:
        RequestError: too little is left.
    """
    held = peak_bytes()
    spare = _SPARE + sum(map(_work, (engine, *others)))
    smallest = _min_pages(engine) * engine.memory.page_bytes + sum(
        each.memory.page_bytes for each in others
    )
    left = total - held - spare
    if left < smallest:
        minimum = held + spare + smallest
        raise RequestError(
            f"{total / 1e6:.0f} MB of memory are too few: the model takes {held / 1e6:.0f} MB and "
            f"working memory {spare / 1e6:.0f} MB; {minimum / 1e6:.0f} MB is the least that can run"
        )
    return left


def default_room(engine: Engine, max_running: int) -> int:
    """Return how many bytes keys and values may take where nobody says.

    One context for each running request, but at most `DEFAULT_SHARE` of the memory that is free
    now, and at least what one request needs.
    """
    page = engine.memory.page_bytes
    full = max_running * (Memory.pages(engine.config.context) + engine.open_pages) + 2
    free = free_bytes()
    pages = full if free is None else min(full, int(DEFAULT_SHARE * free) // page)
    return max(pages, _min_pages(engine)) * page


class KVBudget:
    """Keeps the KV caches of all engines of a worker within one limit.

    All engines take pages from the same bytes. When these run out, memory is reclaimed in this
    order: caches of unused drafters, cached prefixes, drafts of running requests from the least
    important one on (these requests then draft nothing), and last the requests themselves. Drafts
    give way to the model and to guides only. Without a limit (`memory` None) only the model's pages
    are limited.

    Args:
        engine: runs the model.
        scheduler: its `capacity` is set here, in positions.
        memory: maximum bytes of keys and values; None: see `default_room`.
        prefix_cache: share of it that cached prefixes may fill, 0 to 1.

    Attributes:
        idle: returns the drafters that no request uses.
        unwritten: drops texts that wait to be written to disk; returns whether there was any.

    Raises:
        RequestError: the memory cannot hold one request.
    """

    def __init__(
        self, engine: Engine, scheduler: Scheduler, memory: int | None, prefix_cache: float
    ) -> None:
        self.engine, self.scheduler = engine, scheduler
        page = engine.memory.page_bytes
        total = default_room(engine, scheduler.max_running) if memory is None else memory
        minimum = _min_pages(engine)
        if total // page < minimum:
            raise RequestError(
                f"{total} bytes of memory hold {total // page} pages of keys and values, expected "
                f"{minimum} or more: {minimum * page} bytes"
            )
        self._limited = memory is not None
        self.limit = SharedLimit(engine, total)
        self.prefix_cache = PrefixCache(engine, int(prefix_cache * (total // page)))
        self.idle: Callable[[], Iterable[Drafter]] = tuple
        self.unwritten: Callable[[], bool] = lambda: False
        self._drafts = WeakSet[Engine]()
        self._lends = False  # whether drafters have sequences of their own in the model's engine
        scheduler.capacity = self._capacity(total)

    def register(
        self, engines: Iterable[Engine], drafts: bool = False, loaded: bool = False
    ) -> None:
        """Put further engines, whose caches must be empty, under the limit.

        Args:
            engines: new ones, or ones that are registered already.
            drafts: their caches may be dropped at any time.
            loaded: they were loaded before the limit was computed; otherwise their weights count
                too.

        Raises:
            PacelineError: too little memory would be left, or an engine does not report its size.
        """
        for engine in engines:
            if engine is self.engine:
                self._lends |= drafts
                continue
            if not self._limited:
                engine.shared = engine.kv_limit = None  # set by an earlier worker
                continue
            if engine not in self.limit:
                self._add(engine, loaded)
            if drafts:
                self._drafts.add(engine)

    def affords(self, engines: Iterable[Engine]) -> bool:
        """Return whether the weights of engines like these and one page for each fit."""
        if not self._limited:
            return True
        try:
            needed = sum(_taken(each) + each.memory.page_bytes for each in engines)
        except RequestError:  # the size is unknown
            return False
        return self._spares(needed)

    def token_cost(self, run: Session) -> float:
        """Return the positions that one token of a request occupies, in its guides too."""
        page, length = self.engine.memory.page_bytes, len(run.text)
        return 1.0 + sum(
            each.memory.page_bytes / page for each, _ in self._guide_engines(run, length)
        )

    def max_positions(self, run: Session) -> int:
        """Return the positions that a request may come to occupy, in its guides too."""
        own, page = len(run.request.prompt) + run.room + 1, self.engine.memory.page_bytes
        if (policy := run.request.kv_policy) is not None:  # it has no guides
            return policy.max_rows(own) + policy.query_pages(self.engine, own) * PAGE
        if (documents := run.request.documents) is not None:  # one of which is computed apart
            own += len(documents.sink) + PAGE
            own += self.engine.query_pages(max(documents.sizes)) * PAGE
        in_guides = self._guide_engines(run, own)
        blocks = 1.0 if all(engine is self.engine for engine, _ in in_guides) else _BLOCK_OVERHEAD
        parts = [(size + PAGE) * engine.memory.page_bytes / page for engine, size in in_guides]
        beside = self.engine.open_pages + self.engine.prompt_pages(len(run.request.prompt))
        return ceil(blocks * (own + sum(parts))) + beside * PAGE

    def free(self, runs: Sequence[Session]) -> int:
        """Return the positions that running requests can have once all that can be dropped is."""
        held, copied = set[int](), 0
        for run in runs:
            if run.sequence is None:
                continue
            own = self.engine.pages(run.sequence)
            held.update(own)
            # A shared page that is not full is copied before it is written to.
            copied += run.row_count % PAGE > 0 and self.prefix_cache.holds(own[-1])
        unused = self.limit.free(self.engine, self._drafts)
        pages = unused // self.engine.memory.page_bytes + self.prefix_cache.idle(held) - copied
        return (max(pages, 2) if len(runs) < 2 else pages) * PAGE  # one request always fits

    def make_room(self, requests: Sequence[tuple[Session, int, Drafter | None]]) -> None:
        """Reclaim memory before a pass, so that drafters find room too.

        Args:
            requests: sessions, the nodes that each may run, and the drafter that may use memory for
                it.
        """
        pages = drafts = 0
        for run, more, drafter in requests:
            length = run.row_count
            copied = length % PAGE > 0  # the last page may be shared
            pages += Memory.pages(length + more) - Memory.pages(length) + copied
            pages += self.engine.open_pages + self._new_query_pages(run, more)
            if run.sequence is not None and run.sequence.length <= len(run.request.prompt):
                pages += self.engine.prompt_pages(len(run.request.prompt))
            engines = engines_of(drafter) if drafter is not None and self._drafts else ()
            drafts += (Memory.pages(more) + 1) * sum(each.memory.page_bytes for each in engines)
        self.limit.promised = pages
        page, there = self.engine.memory.page_bytes, [each.memory for each in self._drafts]
        drafts -= sum((own.reserved - own.used) * own.page_bytes for own in there)
        drafts = max(drafts, 0)
        while (lack := pages * page + drafts - self.limit.free(self.engine)) > 0:
            if not self.ease(-(-lack // page)):
                return

    def _new_query_pages(self, run: Session, more: int) -> int:
        """Return the pages for the queries that a KV policy keeps of `more` positions."""
        policy = run.request.kv_policy
        if policy is None or run.sequence is None:
            return 0
        ends = (run.sequence.length, run.sequence.length + more)
        before, behind = (policy.query_pages(self.engine, length) for length in ends)
        return behind - before

    def ease(self, pages: int) -> bool:
        """Reclaim about this many pages of the model; return whether any memory was freed."""
        if self._drafts or self._lends:
            before = self.limit.used
            for drafter in self.idle():
                if isinstance(drafter, ModelBacked):
                    drafter.release()
            if self.limit.used < before:
                return True
        return self.prefix_cache.shrink(pages) > 0 or self.unwritten()

    def park(self, drafter: Drafter) -> bool:
        """Drop the KV cache of a running request's drafter; return whether it had any."""
        if not isinstance(drafter, ModelBacked) or not any(map(self._drops, drafter.engines)):
            return False
        before = self.limit.used
        drafter.release()
        return self.limit.used < before

    def _drops(self, engine: Engine) -> bool:
        """Return whether a draft's keys and values in an engine take room from others."""
        return engine in self._drafts or (self._lends and engine is self.engine)

    def _guide_engines(self, run: Session, length: int) -> list[tuple[Engine, int]]:
        """Return the limited engines of guides, and their positions for `length` tokens."""
        in_guides = [each for guide in run.guides for each in guide.positions(length)]
        return [(engine, size) for engine, size in in_guides if size > 0 and engine in self.limit]

    def _add(self, engine: Engine, loaded: bool) -> None:
        taken = 0 if loaded else _taken(engine)
        needed = taken + engine.memory.page_bytes
        if not self._spares(needed):
            raise RequestError(
                f"one more model needs {needed / 1e6:.1f} MB, more memory than is free; "
                "name a model that is loaded, or try again when fewer requests run"
            )
        self.limit.add(engine, taken)
        self.scheduler.capacity = self._capacity(self.limit.total - self.limit.least)

    def _spares(self, needed: int) -> bool:
        """Return whether `needed` bytes can be given away for good; reclaims memory for them."""
        owed = max((job.most for job in self.scheduler.jobs.values()), default=1)
        page = self.engine.memory.page_bytes
        left = self.limit.total - self.limit.least - needed
        if left < _min_pages(self.engine) * page or self._capacity(left) < owed:
            return False
        while (lack := needed - self.limit.free(self.engine)) > 0:
            if not self.ease(-(-lack // page)):
                return False
        return True

    def _capacity(self, total: int) -> int:
        """Return the positions that requests can have in `total` bytes.

        Each request may also hold one page that is shared or not full.
        """
        return max(total // self.engine.memory.page_bytes - 2, 1) * PAGE


def _min_pages(engine: Engine) -> int:
    """Return the pages that one short request needs."""
    return _MIN_PAGES + engine.open_pages


def _work(engine: Engine) -> int:
    """Return the bytes for the logits of its passes."""
    return 2 * _ROWS * 4 * engine.config.vocab_size


def _taken(engine: Engine) -> int:
    """Return the bytes of an engine besides its KV cache: weights, and working memory.

    Raises:
        RequestError: the engine does not report the size of its weights.
    """
    weights = engine.weights_memory or engine.weight_bytes
    if weights is None:
        raise RequestError(
            f"the {engine.name} engine does not report the size of its weights; with a memory "
            "limit use the native engine, or models that are loaded at the start"
        )
    return weights + _work(engine)
