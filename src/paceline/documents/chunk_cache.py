"""Keeps the chunks of documents in memory and, if a folder is given, on disk."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import monotonic
from weakref import finalize

from paceline.documents.chunk import Chunk
from paceline.documents.chunk_folder import ChunkFolder

DEFAULT_MEMORY = 256 * 2**20  # bytes of chunks in memory
DEFAULT_LIMIT = 4 * 10**9  # bytes of a folder
_MAX_WAITING = 16  # chunks that wait to be written
_PAUSE = 60.0  # seconds without writing after an error

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class ChunkStatistics:
    """Counts since the start of the process.

    Attributes:
        memory_hits: chunks that were in memory when a request needed them.
        disk_hits: chunks that were read from the folder.
        misses: chunks that had to be computed.
        evicted: chunks that were removed from memory to keep its limit.
        written: chunks that were written to the folder.
        skipped: chunks that were not written, because the writer was behind or failed.
    """

    memory_hits: int = 0
    disk_hits: int = 0
    misses: int = 0
    evicted: int = 0
    written: int = 0
    skipped: int = 0


class ChunkCache:
    """Chunks by their key, see `chunk_file.chunk_key`. Thread-safe.

    What is found is, to the bit, what was put in. Chunks are written to disk in a thread of their
    own.

    Args:
        memory: maximum bytes in memory; the least recently used chunks are removed first.
        folder: where chunks outlive the process; None: nowhere.
    """

    def __init__(self, memory: int = DEFAULT_MEMORY, folder: ChunkFolder | None = None) -> None:
        self.memory, self.folder = memory, folder
        self.statistics = ChunkStatistics()
        self._chunks: OrderedDict[bytes, Chunk] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self._writer: ThreadPoolExecutor | None = None
        self._waiting = set[Future[None]]()
        self._paused = 0.0  # until when nothing is written

    @property
    def nbytes(self) -> int:
        """Bytes of the chunks in memory."""
        return self._bytes

    def __len__(self) -> int:
        """Return the number of chunks in memory."""
        return len(self._chunks)

    def get(self, key: bytes) -> Chunk | None:
        """Return a chunk from memory, else from disk, else None."""
        with self._lock:
            chunk = self._chunks.get(key)
            if chunk is not None:
                self._chunks.move_to_end(key)
                self.statistics.memory_hits += 1
                return chunk
        chunk = None if self.folder is None else self.folder.read(key)
        with self._lock:
            if chunk is None:
                self.statistics.misses += 1
                return None
            self.statistics.disk_hits += 1
            self._keep(key, chunk)
        return chunk

    def put(self, key: bytes, chunk: Chunk) -> None:
        """Keep a chunk that was just computed."""
        with self._lock:
            self._keep(key, chunk)
            if self.folder is None:
                return
            if len(self._waiting) >= _MAX_WAITING or monotonic() < self._paused:
                self.statistics.skipped += 1
                return
            if self._writer is None:
                self._writer = ThreadPoolExecutor(1, "paceline-chunks")
                # Without waiting, as the last reference may be the writer's; the process waits.
                finalize(self, self._writer.shutdown, wait=False)
            written = self._writer.submit(self._write, self.folder, key, chunk)
            self._waiting.add(written)
        written.add_done_callback(self._waiting.discard)

    def flush(self) -> None:
        """Wait until every chunk is written."""
        for each in list(self._waiting):
            each.result()

    def _keep(self, key: bytes, chunk: Chunk) -> None:
        if key in self._chunks or chunk.nbytes > self.memory:
            return
        self._chunks[key] = chunk
        self._bytes += chunk.nbytes
        while self._bytes > self.memory:
            _, oldest = self._chunks.popitem(last=False)
            self._bytes -= oldest.nbytes
            self.statistics.evicted += 1

    def _write(self, folder: ChunkFolder, key: bytes, chunk: Chunk) -> None:
        try:
            self.statistics.written += folder.write(key, chunk)
        except OSError as error:
            reason = error.strerror or error
            _log.warning(
                "the chunk cache in %s is not written for %.0f s: %s", folder.root, _PAUSE, reason
            )
            self.statistics.skipped += 1
            self._paused = monotonic() + _PAUSE
