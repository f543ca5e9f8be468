"""Stores prefixes on disk, so that a later process need not compute them again."""

from __future__ import annotations

import hashlib
import logging
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile
from math import inf
from pathlib import Path
from time import monotonic, perf_counter
from typing import NamedTuple
from weakref import finalize

from paceline import __version__, _native
from paceline.abilities import Ability
from paceline.compatibility import Side, check, check_needs
from paceline.core import Cost, Tokens
from paceline.engines.base import Cached, Engine
from paceline.engines.page_file import file_size
from paceline.engines.page_folder import Link, PageFolder, stored_pages
from paceline.engines.pages import PAGE
from paceline.engines.shared_folder import StoredFile
from paceline.engines.sides import engine_sides
from paceline.errors import MemoryFullError, RequestError

DEFAULT_LIMIT = 4 * 10**9  # bytes of a folder
_MAX_WAITING = 64  # texts that wait to be written
_PATIENCE = 4  # pages that are read before slow reading is given up
_RECENT, _SAMPLES = 8, 3  # texts whose times are kept, and that are needed for a judgement
_DECAY = 0.9  # of the measured time, for each text that was not read because of it
_PAUSE = 60.0  # seconds without writing after an error
_FLUSH = 30.0  # seconds that the end of the process waits for the writer
_END = 5.0  # seconds more for its thread to end

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class PageStatistics:
    """Counts since the start of the process.

    Attributes:
        read_pages: pages that were read, and so not computed.
        written_pages: pages that were written.
        unusable_pages: files that were damaged, foreign or unreadable.
        evicted_pages: pages that were removed to keep the limit.
        skipped_texts: texts that were not written, because the writer was behind or the folder
            could not be written.
        stored_bytes: size of the folder when it was last written to.
    """

    read_pages: int = 0
    written_pages: int = 0
    unusable_pages: int = 0
    evicted_pages: int = 0
    skipped_texts: int = 0
    stored_bytes: int = 0


class _Text(NamedTuple):
    """A text to be written, with a sequence that holds it."""

    sequence: Cached
    links: list[Link]


class PageStore:
    """Full pages of keys and values of one model in a folder that outlives the process.

    What is loaded is to the bit what the engine would compute: a page is found by its tokens, all
    tokens before it, and the model, formats and code that computed it, and is checked before use.
    Pages are written in a thread of their own. A text is stored up to its last full page of `PAGE`
    tokens.

    Args:
        engine: must have the ability `STORED_PAGES`.
        model: returns the digest of the model's weights, see `Model.digest`.
        folder: where pages are; several processes and models may share one.
        limit: maximum bytes of the folder; the least recently used pages are removed first.

    Raises:
        CombinationError: the engine cannot hand out its pages.
        RequestError: the folder cannot be used, or the limit holds no page.
    """

    def __init__(
        self,
        engine: Engine,
        model: Callable[[], str],
        folder: str | Path,
        limit: int = DEFAULT_LIMIT,
    ) -> None:
        who = "the prefix cache on disk"
        check({Side.STORED_PREFIXES: who, **engine_sides(engine)})
        check_needs(who, {Ability.STORED_PAGES}, engine.name, engine.abilities)
        page = file_size(engine.memory.page_bytes)
        if limit < page:
            raise RequestError(
                f"a prefix cache of {limit} bytes holds no page of this model, which takes {page}"
            )
        self.statistics = PageStatistics()
        self._engine = engine
        self._folder = PageFolder(Path(folder), cache_identity(engine, model()), limit)
        self._writer = _Writer(engine, self._folder, self.statistics)
        self._page_seconds: deque[float] = deque(maxlen=_RECENT)  # to read one, measured
        self.close = finalize(self, self._writer.close)

    @property
    def folder(self) -> Path:
        """The folder."""
        return self._folder.root

    def load(
        self,
        tokens: Tokens,
        sequence: Cached,
        cost: Cost | None = None,
        reclaim: Callable[[], bool] = lambda: False,
    ) -> int:
        """Append the stored pages of `tokens` [S] to a sequence that holds the text's beginning.

        Leave out the last token of a prompt: it must be run to get logits.

        Args:
            tokens: a text.
            sequence: holds its first tokens, or none.
            cost: of the engine's passes; where reading pages has taken longer than computing them
                would, nothing is read. None: unknown.
            reclaim: frees memory for a page; returns whether it could.

        Returns:
            the length of the sequence.
        """
        start = sequence.length // PAGE
        links = list(self._folder.links(tokens))
        compute = inf if cost is None else PAGE * cost.seconds[-1] / cost.nodes[-1]
        stored = list(takewhile(self._folder.holds, links[start:]))
        if not stored or not self._worthwhile(compute):
            return sequence.length
        begun, end = perf_counter(), start
        for link in stored:
            if not self._append(sequence, link, end * PAGE, reclaim):
                break
            end += 1
            read = end - start
            if read >= _PATIENCE and perf_counter() - begun > 2 * compute * read:
                break
        if end > start:
            self._page_seconds.append((perf_counter() - begun) / (end - start))
            self.statistics.read_pages += end - start
        return sequence.length

    def save(self, tokens: Tokens, sequence: Cached) -> None:
        """Write the full pages of `tokens` [S] in the background, those that are not stored yet.

        Args:
            tokens: a text.
            sequence: begins with it; it stays the caller's.
        """
        links = list(self._folder.links(tokens[: sequence.length]))
        if links:
            self._writer.put(_Text(self._engine.fork(sequence), links))

    def give_way(self) -> bool:
        """Drop the texts that wait to be written; return whether there was any.

        Their sequences hold pages of the engine.
        """
        return self._writer.drop()

    def flush(self, seconds: float = _FLUSH) -> bool:
        """Wait until everything is written; return whether it is."""
        return self._writer.wait(seconds)

    def _append(
        self, sequence: Cached, link: Link, length: int, reclaim: Callable[[], bool]
    ) -> bool:
        """Append a page behind the first `length` positions; return whether it could be done."""
        page = self._folder.read(link, self._engine.memory.page_bytes)
        if page is None:
            self.statistics.unusable_pages = self._folder.unusable
            return False
        while True:
            try:
                if sequence.length > length:
                    self._engine.truncate(sequence, length)
                self._engine.append_page(sequence, page)
                return True
            except MemoryFullError:
                if not reclaim():
                    return False

    def _worthwhile(self, compute: float) -> bool:
        """Return whether reading takes less time than computing, by the best recent time.

        A machine that is busy with something else makes single times long.
        """
        seconds = self._page_seconds
        if len(seconds) < _SAMPLES or min(seconds) < compute:
            return True
        seconds.append(_DECAY * min(seconds))  # tried again some time
        return False


@dataclass(eq=False)
class _Writer:
    """Writes texts in a thread, which is started by the first."""

    engine: Engine
    folder: PageFolder
    statistics: PageStatistics
    _waiting: deque[_Text] = field(default_factory=deque)
    _change: threading.Condition = field(default_factory=threading.Condition)
    _thread: threading.Thread | None = None
    _busy: bool = False
    _closed: bool = False
    _paused: float = 0.0  # until when

    def put(self, text: _Text) -> None:
        with self._change:
            if self._closed or len(self._waiting) >= _MAX_WAITING or monotonic() < self._paused:
                self.statistics.skipped_texts += 1
                self.engine.release(text.sequence)
                return
            self._waiting.append(text)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="paceline-pages", daemon=True
                )
                self._thread.start()
            self._change.notify_all()

    def drop(self) -> bool:
        with self._change:
            dropped = len(self._waiting)
            while self._waiting:
                self.engine.release(self._waiting.popleft().sequence)
            self.statistics.skipped_texts += dropped
            self._change.notify_all()
        return dropped > 0

    def wait(self, seconds: float) -> bool:
        with self._change:
            return self._change.wait_for(lambda: not self._waiting and not self._busy, seconds)

    def close(self) -> None:
        """Write what waits, and end the thread."""
        outside = threading.current_thread() is not self._thread  # which may collect garbage
        if outside:
            self.wait(_FLUSH)
        with self._change:
            self._closed = True
            self._change.notify_all()
        self.drop()
        if self._thread is not None and outside:
            self._thread.join(_END)  # at the end of the process, it must not hold the engine

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                text, self._busy = self._waiting.popleft(), True
            try:
                self._write(text)
            except OSError as error:
                _log.warning(
                    "the prefix cache in %s is not written for %.0f s: %s",
                    self.folder.root,
                    _PAUSE,
                    error.strerror or error,
                )
                self.statistics.skipped_texts += 1
                self._paused = monotonic() + _PAUSE
            except Exception:
                _log.exception("a text was not written to the prefix cache")
                self.statistics.skipped_texts += 1
            finally:
                self.engine.release(text.sequence)
                del text
                with self._change:
                    self._busy = False
                    self._change.notify_all()

    def _write(self, text: _Text) -> None:
        """Write the pages that are not there, and remove the oldest ones of others for them."""
        size = file_size(self.engine.memory.page_bytes)
        links = text.links[: self.folder.limit // size]  # the first ones are needed by all others
        with self.folder.locked():
            missing = [place for place, link in enumerate(links) if not self.folder.holds(link)]
            self.folder.touch(links)
            if not missing:
                return
            own = set(map(self.folder.path, links))
            files = sorted(stored_pages(self.folder.root))
            total = sum(each.size for each in files)
            others = deque(each for each in files if each.path not in own)
            for place in missing:
                total -= self._evict(others, total + size - self.folder.limit)
                if total + size > self.folder.limit:
                    break
                page = self.engine.read_page(text.sequence, place)
                total += self.folder.write(links[place], page)
                self.statistics.written_pages += 1
            self.folder.touch(links)
            self.statistics.stored_bytes = total

    def _evict(self, others: deque[StoredFile], excess: int) -> int:
        """Remove files, the least recently used first; return the bytes that were freed."""
        freed = 0
        while freed < excess and others:
            oldest = others.popleft()
            oldest.path.unlink(missing_ok=True)
            freed += oldest.size
            self.statistics.evicted_pages += 1
        return freed


def cache_identity(engine: Engine, model: str) -> bytes:
    """Return 32 bytes that differ wherever keys and values may."""
    code = hashlib.sha256(Path(_native.__file__).read_bytes()).hexdigest()
    parts = (
        *(__version__, code, sys.byteorder, model, engine.name, engine.format, engine.kv_format),
        *(getattr(engine, "isa", ""), engine.memory.page_bytes, PAGE, engine.config),
    )
    return hashlib.sha256(repr(parts).encode()).digest()
