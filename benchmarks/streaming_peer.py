"""llama.cpp on a memory map of which only some bytes stay in memory, for `streaming.py`.

`RLIMIT_DATA` does not count the pages of a mapped file, and where a process may not make a control
group nothing else bounds them. So before every pass all pages of the file but its first `keep`
bytes are unmapped and dropped from the page cache. That is what the best policy would leave of so
many bytes; the system's own, least recently used, would leave none of them, as a pass reads the
file in one cycle. The time to drop pages is not counted.

Its weights are used as they lie in the file: by default llama.cpp packs many of them anew, into
memory that is no file's, which for a model like this is more than the limit.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from llama_cpp import Library, LlamaCpp

from paceline.byte_sizes import Size
from paceline.engines.threads import default_threads
from paceline.machine import peak_bytes
from paceline.models import load

_DONTNEED = 4  # MADV_DONTNEED of Linux
_PAGE = os.sysconf("SC_PAGE_SIZE")


def run_mapped(asked: argparse.Namespace, prompts: list[str], keep: int) -> dict[str, Any]:
    """Generate greedily with llama.cpp in this process, and return what `streaming.py` prints."""
    if asked.limit:
        limit = int(Size.parse(asked.limit))
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    path, start = Path(asked.model).resolve(), perf_counter()
    tokenizer = load(asked.model).tokenizer
    threads = asked.threads or default_threads()
    ids = [np.array(tokenizer.encode(each), np.int32) for each in prompts]
    context = max(map(len, ids)) + asked.tokens
    peer = LlamaCpp(Library(), path, context, threads, repack=False)
    loaded, total, prefill, read = perf_counter() - start, 0.0, 0.0, 0
    texts: list[list[int]] = []
    for prompt in ids:
        peer.truncate(0)
        given, tokens = prompt, []
        while len(tokens) < asked.tokens:
            evict(path, keep)
            before, start = bytes_read(), perf_counter()
            logits = peer.extend(given, True)
            assert logits is not None
            given = logits[-1:].argmax(1).astype(np.int32)
            seconds = perf_counter() - start
            total += seconds
            if not tokens:
                prefill += seconds
            else:
                read += bytes_read() - before
            tokens.append(int(given[0]))
        texts.append(tokens)
    peer.close()
    passes = sum(map(len, texts))
    return {
        "load": loaded,
        "prefill": prefill,
        "total": total,
        "tokens": texts,
        "passes": passes,
        "streamed_bytes": read // max(passes - len(texts), 1),
        "read_speed": None,
        "governor": None,
        "peak": peak_bytes(),
    }


def evict(path: Path, keep: int) -> None:
    """Drop all pages of a file but its first `keep` bytes, from this process and the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    keep = keep // _PAGE * _PAGE
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or fields[5] != str(path):
            continue
        begin, end = (int(each, 16) for each in fields[0].split("-"))
        begin = max(begin, begin + keep - int(fields[2], 16))
        size = ctypes.c_size_t(end - begin)
        if begin < end and libc.madvise(ctypes.c_void_p(begin), size, _DONTNEED):
            raise SystemExit(f"madvise failed: {os.strerror(ctypes.get_errno())}")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, keep, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def bytes_read() -> int:
    """Return the bytes that this process has caused to be read from disks so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])
