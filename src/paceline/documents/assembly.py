"""Puts documents into a sequence: what is stored as it is, and what must run first.

The cache of a prompt with documents is a function of the prompt alone, however its parts come in:

1. the tokens before the documents are run as usual;
2. each document is run behind a sink in a sequence of its own, unless its chunk is stored
   (TurboRAG, Lu et al. 2024, section 3: independent attention of chunks, rearranged positions);
3. its rows are put behind the sequence, keys moved to their new positions;
4. with `recompute`, the tokens that depend most on what stands before are run in place instead,
   and see everything before them (Cache-Craft, Agarwal et al. 2025, section 3);
5. the tokens behind the documents are run as usual, and see everything.

So any drafter, chunk, batch and number of threads gives what plain decoding gives over that cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paceline.core import Floats, Tokens
from paceline.documents.chunk import Chunk, check_engine, moved, probes, read_chunk
from paceline.documents.chunk_cache import ChunkCache
from paceline.documents.chunk_file import chunk_key
from paceline.documents.dependence import cross_attention, recomputed_runs
from paceline.engines.base import Cached, Engine
from paceline.engines.pages import PAGE

_SLICE = 512  # rows that are moved at once


@dataclass(frozen=True, slots=True, eq=False)
class Documents:
    """Documents in a request's prompt, whose keys and values are computed apart.

    Attributes:
        start: index of the first document's first token in the prompt.
        sizes: number of tokens of each; they follow one another.
        sink: tokens before each document when it is computed, at least one.
        recompute: share of the tokens of each document but the first that are computed again in
            the prompt, 0 to 1.
        cache: keeps chunks.
    """

    start: int
    sizes: tuple[int, ...]
    sink: tuple[int, ...]
    recompute: float
    cache: ChunkCache

    @property
    def end(self) -> int:
        """Index of the first token behind the documents."""
        return self.start + sum(self.sizes)

    def check(self, engine: Engine) -> None:
        """Refuse an engine or a model whose keys cannot be moved.

        Raises:
            MethodError: names what is in the way.
        """
        check_engine(engine, self.end)


class Assembly:
    """The documents of one request on their way into its sequence.

    Call `load` whenever the sequence has grown. While `unfinished`, run what `part` returns and
    call `commit` then.

    Args:
        engine: runs the model.
        documents: in the prompt.
        prompt: its tokens.

    Attributes:
        cached: tokens of documents whose chunks were stored.
    """

    def __init__(self, engine: Engine, documents: Documents, prompt: Sequence[int]) -> None:
        self.cached = 0
        self._engine, self._documents = engine, documents
        self._prompt = np.array(prompt, np.int32)
        self._starts = documents.start + np.cumsum([0, *documents.sizes])
        self._index = 0  # of the document that is put in next
        self._chunk: Chunk | None = None  # of that document
        self._runs: list[tuple[int, int]] = []  # of it, that are left to be computed in place
        self._aside: Cached | None = None  # computes its chunk
        self._counted = 0  # documents of which it is known whether they were stored
        self._before: dict[int, list[Floats]] = {}  # rotated keys before it, by layer

    @property
    def unfinished(self) -> bool:
        """Whether a document is not yet in the sequence."""
        return self._index < len(self._documents.sizes)

    @property
    def progress(self) -> int:
        """Tokens of the next document that were run apart and are not in the sequence yet."""
        if self._aside is None:
            return 0
        return max(0, self._aside.length - len(self._documents.sink))

    @property
    def rows(self) -> int:
        """Rows of the sequence that computes a document apart, and of its tracked queries."""
        if self._aside is None:
            return 0
        return self._aside.length + self._engine.query_pages(self.progress) * PAGE

    def load(self, sequence: Cached) -> None:
        """Put in everything that is stored, up to where something must run first.

        Raises:
            MemoryFullError: there is no room. What was put in stays; call it again later.
        """
        while self.unfinished and sequence.length >= self._documents.start:
            if self._chunk is None and not self._find_chunk(sequence):
                return
            assert self._chunk is not None
            size, first = len(self._chunk), int(self._starts[self._index])
            at = sequence.length - first
            stop = self._runs[0][0] if self._runs else size
            for begin in range(at, stop, _SLICE):
                end = min(begin + _SLICE, stop)
                rows = self._chunk.rows(self._engine.config, first, begin, end)
                self._engine.append_rows(sequence, rows)
            if self._runs:
                return
            self._index, self._chunk = self._index + 1, None

    def part(self, sequence: Cached, max_tokens: int) -> tuple[Cached, Tokens]:
        """Return the tokens to run next, at most `max_tokens`, and the sequence to run them on.

        Call it while `unfinished`, behind `load`.
        """
        if sequence.length < self._documents.start:
            end = min(sequence.length + max_tokens, self._documents.start)
            return sequence, self._prompt[sequence.length : end]
        first, size = int(self._starts[self._index]), self._documents.sizes[self._index]
        if self._aside is not None:
            text = self._prompt[first : first + size]
            whole = np.concatenate([np.array(self._documents.sink, np.int32), text])
            return self._aside, whole[self._aside.length :][:max_tokens]
        end = min(sequence.length + max_tokens, first + self._runs[0][1])
        return sequence, self._prompt[sequence.length : end]

    def commit(self, sequence: Cached, on: Cached, count: int) -> None:
        """Commit `count` nodes of a chain that were run on a sequence of `part`."""
        self._engine.commit(on, np.arange(count, dtype=np.int32))
        documents = self._documents
        if on is self._aside:
            if self.progress == documents.sizes[self._index]:
                self._chunk = read_chunk(self._engine, on, len(documents.sink))
                documents.cache.put(self._key(), self._chunk)
                self._close_aside()
                self._choose(sequence)
        elif self._runs and sequence.length == self._starts[self._index] + self._runs[0][1]:
            del self._runs[0]

    def close(self) -> None:
        """Release the sequence that computes a document."""
        self._close_aside()
        self._index, self._chunk, self._runs, self._before = 0, None, [], {}

    def _find_chunk(self, sequence: Cached) -> bool:
        """Look for the next document's chunk; else open a sequence to compute it."""
        if self._aside is not None:
            return False
        self._chunk = self._documents.cache.get(self._key())
        if self._chunk is None:
            self._aside = self._engine.open()
            self._engine.track_queries(self._aside, self._documents.sizes[self._index])
            self._counted = max(self._counted, self._index + 1)
            return False
        if self._index >= self._counted:  # else the request has computed it itself
            self._counted = self._index + 1
            self.cached += len(self._chunk)
        self._choose(sequence)
        return True

    def _key(self) -> bytes:
        first = int(self._starts[self._index])
        tokens = self._prompt[first : first + self._documents.sizes[self._index]]
        return chunk_key(self._documents.sink, tokens.tolist())

    def _choose(self, sequence: Cached) -> None:
        """Choose the tokens of the next document that are computed in place."""
        documents, config = self._documents, self._engine.config
        self._runs = []
        if not documents.recompute:
            return
        assert self._chunk is not None
        first = int(self._starts[self._index])
        if not self._before and documents.start:
            for layer in probes(config):
                self._before[layer] = [self._engine.keys_values(sequence, layer)[0]]
        if self._index:
            before = {layer: np.concatenate(keys, 1) for layer, keys in self._before.items()}
            scores = cross_attention(self._chunk, config, first, documents.start, before)
            self._runs = recomputed_runs(scores, documents.recompute)
        for layer in probes(config):
            keys = moved(config.layers[layer], self._chunk.keys[layer], first - self._chunk.start)
            self._before.setdefault(layer, []).append(keys)

    def _close_aside(self) -> None:
        if self._aside is not None:
            self._engine.release(self._aside)
            self._aside = None
