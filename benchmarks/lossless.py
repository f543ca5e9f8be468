"""Lossless packing of a model's matrices: size and speed, beside zipnn where it is installed.

    python benchmarks/lossless.py MODEL [--threads 1 2] [--rounds 5] [--megabytes 200]

The floating-point matrices of MODEL, as many as come to `--megabytes`, are packed and unpacked
matrix by matrix, and what comes back is compared; the two libraries take turns. Speeds are bytes of
the unpacked matrices by the median time of the rounds, and sizes all that is stored.
`--pruned SHARE` first sets the smallest weights of each matrix to zero.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from busy import busy_others, ticks

from paceline.errors import ModelError
from paceline.machine import machine
from paceline.models import load
from paceline.models.tensors import Dense, PackedFloats, pack_smallest, widen

_ZIPNN = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


class Ours:
    """Packing as `paceline convert --lossless` does it."""

    name = "paceline"

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def pack(self, matrix: Dense) -> Dense | PackedFloats:
        """Return the packed matrix."""
        return pack_smallest(matrix, self._threads)

    def unpack(self, packed: Dense | PackedFloats) -> memoryview:
        """Return the bytes of the matrix."""
        whole = packed.unpack(self._threads) if isinstance(packed, PackedFloats) else packed
        return whole.values.reshape(-1).view(np.uint8).data

    def size(self, packed: Dense | PackedFloats) -> int:
        """Return the bytes of a packed matrix."""
        return packed.nbytes


class Zipnn:
    """The library of the paper."""

    name = "zipnn"

    def __init__(self, threads: int) -> None:
        from zipnn import ZipNN

        self._packers = {
            kind: ZipNN(bytearray_dtype=name, threads=threads) for kind, name in _ZIPNN.items()
        }

    def pack(self, matrix: Dense) -> tuple[str, bytes]:
        """Return the packed matrix; the library changes its input, which is a copy."""
        return matrix.dtype, self._packers[matrix.dtype].compress(matrix.values.tobytes())

    def unpack(self, packed: tuple[str, bytes]) -> memoryview:
        """Return the bytes of the matrix."""
        return memoryview(self._packers[packed[0]].decompress(packed[1]))

    def size(self, packed: tuple[str, bytes]) -> int:
        """Return the bytes of a packed matrix."""
        return len(packed[1])


def matrices(path: Path, megabytes: int, pruned: float) -> list[Dense]:
    """Return floating-point matrices of a model, in its order.

    Raises:
        ModelError: it has none.
    """
    weights, held, found = load(path).weights, 0, []
    for name in weights:
        matrix = weights.stored(name)
        if not isinstance(matrix, Dense) or (found and held + matrix.nbytes > megabytes * 1e6):
            continue
        values = np.array(matrix.values)
        if pruned:
            size = np.abs(widen(values, matrix.dtype))
            values[size < np.quantile(size, pruned)] = 0
        found.append(Dense(values, matrix.dtype))
        held += matrix.nbytes
    if not found:
        raise ModelError(f"{path} has no floating-point matrices")
    return found


def seconds(work: Callable[[Any], Any], items: Sequence[Any]) -> float:
    """Return the time for all items; one result is in memory at a time, as in loading."""
    start = perf_counter()
    for each in items:
        work(each)
    return perf_counter() - start


def compare(held: list[Dense], threads: int, rounds: int) -> list[dict[str, Any]]:
    """Return sizes and speeds of each library."""
    peers: list[Any] = [Ours(threads)]
    with suppress(ImportError):
        peers.append(Zipnn(threads))
    total = sum(each.nbytes for each in held)
    packing: dict[str, list[float]] = {peer.name: [] for peer in peers}
    unpacking: dict[str, list[float]] = {peer.name: [] for peer in peers}
    stored = {peer.name: [peer.pack(each) for each in held] for peer in peers}
    for turn in range(rounds):
        for peer in peers[:: -1 if turn % 2 else 1]:
            packing[peer.name].append(seconds(peer.pack, held))
            unpacking[peer.name].append(seconds(peer.unpack, stored[peer.name]))
    sizes = {peer.name: sum(map(peer.size, stored[peer.name])) for peer in peers}
    same = {
        peer.name: all(
            peer.unpack(one) == other.values.tobytes()
            for one, other in zip(stored[peer.name], held, strict=True)
        )
        for peer in peers
    }
    return [
        {
            "library": name,
            "threads": threads,
            "share": sizes[name] / total,
            "pack_gbs": total / median(packing[name]) / 1e9,
            "unpack_gbs": total / median(unpacking[name]) / 1e9,
            "bit_exact": same[name],
        }
        for name in sizes
    ]


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--pruned", type=float, default=0.0, help="share of zeros, e.g. 0.5")
    options = parser.parse_args()
    held = matrices(options.model, options.megabytes, options.pruned)
    before = ticks()
    for threads in options.threads:
        for row in compare(held, threads, options.rounds):
            print(json.dumps(row), flush=True)
    print(json.dumps({"busy": busy_others(before, ticks()), "machine": machine()}))


if __name__ == "__main__":
    main()
