"""Chunks in memory and on disk: bounded, found again to the bit, and safe against damage."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from paceline import LM
from paceline.documents.chunk import Chunk
from paceline.documents.chunk_cache import ChunkCache
from paceline.documents.chunk_file import chunk_key, decode, encode
from paceline.documents.chunk_folder import ChunkFolder
from paceline.engines.page_file import DamagedPageError, ForeignPageError
from paceline.errors import MethodError, RequestError

IDENTITY, OTHER = b"i" * 32, b"j" * 32
DOCUMENTS = ["Tom had a big red ball. He liked it.", {"title": "Lily", "text": "She had a cat."}]


def chunk(seed: int = 0, size: int = 20, kind: str = "f4") -> Chunk:
    rng = np.random.default_rng(seed)
    rows = [rng.normal(size=(2, size, 4)).astype(kind) for _ in range(5)]
    return Chunk(1, tuple(rows[:2]), tuple(rows[2:4]), {1: rows[4]})


def same(a: Chunk, b: Chunk) -> bool:
    pairs = zip(
        (*a.keys, *a.values, *a.queries.values()),
        (*b.keys, *b.values, *b.queries.values()),
        strict=True,
    )
    return a.start == b.start and all(
        x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in pairs
    )


def key(number: int) -> bytes:
    return chunk_key((1,), (number,))


def test_keys_tell_sinks_and_texts_apart() -> None:
    keys = {
        chunk_key((), (1, 2)), chunk_key((1,), (2,)), chunk_key((1, 2), ()), chunk_key((2,), (1,))
    }  # fmt: skip
    assert len(keys) == 4


def test_a_cache_may_be_dropped_while_its_thread_writes(tmp_path, monkeypatch) -> None:
    begun, dropped, write = Event(), Event(), ChunkFolder.write

    def slow(*args):
        begun.set()
        assert dropped.wait(60)
        return write(*args)

    errors = []
    monkeypatch.setattr(sys, "unraisablehook", errors.append)
    monkeypatch.setattr(ChunkFolder, "write", slow)
    cache = ChunkCache(folder=ChunkFolder(tmp_path, IDENTITY, 10**6))
    cache.put(key(1), chunk())
    assert begun.wait(60)
    [written] = cache._waiting
    [thread] = cache._writer._threads
    del cache
    dropped.set()
    written.result(60)
    thread.join(60)
    assert not errors
    assert same(ChunkFolder(tmp_path, IDENTITY, 10**6).read(key(1)), chunk())


@pytest.mark.parametrize("kind", ["f4", "f2"])
def test_a_file_gives_back_every_bit(kind) -> None:
    data = b"".join(encode(IDENTITY, key(1), chunk(kind=kind)))
    assert same(decode(data, IDENTITY, key(1)), chunk(kind=kind))


def test_no_changed_file_is_taken() -> None:
    data = b"".join(encode(IDENTITY, key(1), chunk()))
    for size in (0, 7, 90, 130, len(data) - 1):
        with pytest.raises(DamagedPageError):
            decode(data[:size], IDENTITY, key(1))
    for place in range(12, len(data), 211):
        changed = bytearray(data)
        changed[place] ^= 4
        with pytest.raises(DamagedPageError):
            decode(bytes(changed), IDENTITY, key(1))
    for identity, number in ((OTHER, 1), (IDENTITY, 2)):
        with pytest.raises(DamagedPageError, match="another text or model"):
            decode(data, identity, key(number))
    with pytest.raises(ForeignPageError):
        decode(b"PK" + data[2:], IDENTITY, key(1))
    with pytest.raises(ForeignPageError, match="version 9"):
        decode(data[:8] + b"\x09" + data[9:], IDENTITY, key(1))


def test_memory_keeps_the_most_recently_used() -> None:
    cache = ChunkCache(memory=2 * chunk().nbytes)
    for number in range(2):
        cache.put(key(number), chunk(number))
    assert cache.get(key(0)) is not None
    cache.put(key(2), chunk(2))
    assert cache.get(key(1)) is None
    assert same(cache.get(key(0)), chunk(0))
    assert (len(cache), cache.nbytes) == (2, 2 * chunk().nbytes)
    cache.put(key(3), chunk(3, size=1000))  # larger than all of it
    assert cache.get(key(3)) is None
    found = cache.statistics
    assert (found.memory_hits, found.misses, found.evicted) == (2, 2, 1)
    assert ChunkCache(memory=0).get(key(0)) is None


def test_a_folder_outlives_the_process_and_keeps_its_limit(tmp_path: Path) -> None:
    size = len(b"".join(encode(IDENTITY, key(0), chunk())))
    for number in range(5):
        cache = ChunkCache(folder=ChunkFolder(tmp_path, IDENTITY, 3 * size))
        cache.put(key(number), chunk(number))
        cache.flush()
        for path in tmp_path.rglob("*.chunk"):  # times differ, whatever the file system's clock
            os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - 10**9))
    fresh = ChunkCache(folder=ChunkFolder(tmp_path, IDENTITY, 3 * size))
    assert [fresh.get(key(number)) is not None for number in range(5)] == [False] * 2 + [True] * 3
    assert same(fresh.get(key(4)), chunk(4))
    assert fresh.folder.stored_bytes == 3 * size
    assert ChunkCache(folder=ChunkFolder(tmp_path, OTHER, 3 * size)).get(key(4)) is None
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".chunk", ""}


def test_damaged_files_are_removed_and_foreign_ones_left(tmp_path: Path) -> None:
    folder = ChunkFolder(tmp_path, IDENTITY, 10**9)
    for number in range(3):
        assert folder.write(key(number), chunk(number))
    assert not folder.write(key(0), chunk(0))
    data = folder.path(key(0)).read_bytes()
    folder.path(key(0)).write_bytes(data[: len(data) // 2])
    folder.path(key(1)).write_bytes(b"something else entirely, but long enough" * 9)
    folder.path(key(2)).unlink()
    folder.path(key(2)).mkdir()
    assert [folder.read(key(number)) for number in range(3)] == [None] * 3
    assert not folder.path(key(0)).exists()
    assert folder.path(key(1)).exists()
    assert folder.unusable == 3


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot hold a chunk cache"):
        ChunkFolder(tmp_path / "file", IDENTITY, 1)
    with pytest.raises((RequestError, MethodError), match="chunk_cache_dir"):
        LM(chunk_cache_dir=3)
    with pytest.raises((RequestError, MethodError), match="chunk_cache_bytes"):
        LM(chunk_cache_dir=tmp_path, chunk_cache_bytes=0)


def test_the_next_process_computes_no_document_again(tmp_path: Path) -> None:
    options = {"documents": DOCUMENTS, "max_new_tokens": 20, "recompute": 0.2}
    first = LM(chunk_cache_dir=tmp_path, drafter="plain")
    expected = first.generate("Lily and", **options)
    first.request_builder.chunks.flush()
    second = LM(chunk_cache_dir=tmp_path, drafter="plain")
    found = second.generate("Lily and", **options)
    assert found.tokens == expected.tokens
    sizes = second.request("Lily and", **options).documents.sizes
    assert (expected.cached_tokens, found.cached_tokens) == (0, sum(sizes))
    counts = second.request_builder.chunks.statistics
    assert (counts.disk_hits, counts.misses, counts.written) == (2, 0, 0)
    for path in tmp_path.rglob("*.chunk"):
        path.write_bytes(path.read_bytes()[:-9])
    third = LM(chunk_cache_dir=tmp_path, drafter="plain")
    assert third.generate("Lily and", **options).tokens == expected.tokens
    assert third.request_builder.chunks.folder.unusable == 2
    third.request_builder.chunks.flush()
    other = LM(chunk_cache_dir=tmp_path, drafter="plain", kv_format="fp16")
    assert other.generate("Lily and", **options).cached_tokens == 0
