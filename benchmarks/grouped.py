"""Time passes over integers in groups: bits, groups and activations of a model beside each other.

    python benchmarks/grouped.py [FILE.gguf] [--forms 8:32 4:128 3:128] [--shape 1.1b]
        [--act int16] [--sizes 1 8 12 16] [--rounds 7] [--threads N] [--head-bits 0]

The layers of a model become integers in memory, rounded to nearest with an fp16 scale for each
group; a form is BITS:GROUP, with `:zero` for zero points, `:pairs` where two of every four are
not zero, `:half` where any half of a row is not, `:steps` where scales are whole numbers of six
bits, `:steps_zero` for both, `:levels` for such scales and a table of levels, `:table` for a table
of numbers for each row and no scales, `:eora` for a product of rank 32 beside it, in 8 bits.
Without a file they are random, at a shape of `step.py`; with `--random` they are so at the shape
of the file, which takes less time. The head becomes integers, too, in groups of 32, where
`--head-bits` says how many. Forms take turns, and times are medians behind 64 cached tokens; the
gain is that of a pass over one token against the first form.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from step import SHAPES, RandomWeights, draw

from paceline.core import Floats, TokenTree
from paceline.engines.native import NativeEngine
from paceline.models import load
from paceline.models.config import ModelConfig
from paceline.models.tensors import Codebook, Grouped, Linear, LowRank, Sum, TwoGrained

SPARSE = ("pairs", "half")
KINDS = ("", "zero", *SPARSE, "steps", "steps_zero", "levels", "table", "eora")
STEP_BITS, RANK = 6, 32


def rounded(values: Floats, bits: int, group: int, zero: bool) -> Grouped:
    """Return a matrix [out, in] rounded to the nearest integers."""
    rows, columns = values.shape
    groups = np.pad(values, ((0, 0), (0, -columns % group))).reshape(rows, -1, group)
    low, high = groups.min(-1).clip(max=0), groups.max(-1).clip(min=0)
    top, half = (1 << bits) - 1, 1 << (bits - 1)
    size = (high - low) / top if zero else np.maximum(high / (half - 1), -low / half)
    scales = size.astype(np.float16).astype(np.float32)
    inverse = (1 / np.where(scales > 0, scales, np.inf)).astype(np.float32)
    points = np.rint(-low * inverse).clip(0, top) if zero else np.full_like(scales, half)
    codes = np.rint(groups * inverse[..., None] + points[..., None]).clip(0, top)
    whole = codes.reshape(rows, -1)[:, :columns].astype(np.uint8)
    zeros = points.astype(np.uint16) if zero else None
    return Grouped(bits, np.ascontiguousarray(whole), scales, group, zeros, scale_type="F16")


def drawn(shape: tuple[int, int], bits: int, group: int, zero: bool) -> Grouped:
    """Return random integers of the size of usual weights."""
    random = np.random.default_rng(0)
    (rows, columns), groups = shape, -(-shape[1] // group)
    codes = np.frombuffer(random.bytes(rows * columns), np.uint8).reshape(shape) >> (8 - bits)
    scales = np.full((rows, groups), 2.0 ** -(bits + 4), np.float32)
    points = random.integers(0, 1 << bits, scales.shape).astype(np.uint16) if zero else None
    return Grouped(bits, codes, scales, group, points, scale_type="F16")


def pruned(matrix: Grouped, kind: str, at_random: bool) -> Grouped:
    """Return a matrix with half of its integers zero: those farthest from zero stay.

    Args:
        matrix: with no zero points.
        kind: `pairs`, two of every four neighbours stay; or `half`, half of every row.
        at_random: its integers are so, and the first half of every four, or of every eight, go.
    """
    rows, columns = matrix.shape
    codes, half = matrix.codes, 1 << (matrix.bits - 1)
    together = {"pairs": 4, "half": 8 if at_random else columns}[kind]
    if at_random:  # any half does for times
        codes = codes.copy()
        for place in range(together // 2):
            codes[:, place::together] = half
        return replace(matrix, codes=codes)
    sizes = np.abs(codes.astype(np.int16) - half).reshape(rows, -1, together)
    gone = np.argsort(sizes, axis=-1, kind="stable")[..., : together // 2]
    kept = codes.reshape(sizes.shape).copy()
    np.put_along_axis(kept, gone, half, -1)
    return replace(matrix, codes=kept.reshape(rows, columns))


def two_grained(matrix: Grouped, levels: bool) -> TwoGrained:
    """Return a matrix whose scales are whole numbers of six bits times a number for each row."""
    most = (1 << STEP_BITS) - 1
    units = (matrix.scales.max(1) / most).astype(np.float16).astype(np.float32)
    steps = np.rint(matrix.scales / np.where(units > 0, units, 1)[:, None]).clip(0, most)
    zeros = None if matrix.zeros is None else matrix.zeros.astype(np.uint8)
    table = np.linspace(-127, 127, 1 << matrix.bits).astype(np.int8) if levels else None
    parts = (matrix.codes, matrix.group, steps.astype(np.uint8), STEP_BITS, units)
    return TwoGrained(matrix.bits, *parts, zeros, table)


def tabled(matrix: Grouped) -> Codebook:
    """Return the codes of a matrix with a table of numbers for each row."""
    rows = len(matrix.codes)
    entries = np.linspace(-1, 1, 1 << matrix.bits).astype(np.float16).astype(np.float32)
    tables = np.ascontiguousarray(np.broadcast_to(entries[:, None], (1, rows, len(entries), 1)))
    return Codebook(matrix.codes.astype(np.uint16)[..., None], tables, float_type="F16")


def stored(matrix: Grouped, kind: str, at_random: bool) -> Linear:
    """Return a matrix in the form that a kind names; see the top of this file."""
    if kind in SPARSE:
        return pruned(matrix, kind, at_random)
    if kind == "table":
        return tabled(matrix)
    if kind == "eora":
        rows, inputs = matrix.shape
        left, right = drawn((rows, RANK), 8, 32, False), drawn((RANK, inputs), 8, 32, False)
        return Sum((matrix, LowRank(left, right)))
    if kind in ("steps", "steps_zero", "levels"):
        return two_grained(matrix, kind == "levels")
    return matrix


class AsIntegers(Mapping[str, Linear | Floats]):
    """The weights of a model with the matrices of its layers as integers, made when asked for."""

    def __init__(
        self, weights: Mapping[str, Linear | Floats], form: str, head_bits: int, random: bool
    ) -> None:
        bits, group, *kind = form.split(":")
        self._kind = kind[0] if kind else ""
        if self._kind not in KINDS:
            raise SystemExit(f"unknown kind {self._kind!r}; choose one of {', '.join(KINDS[1:])}")
        self._form = int(bits), int(group), self._kind in ("zero", "steps_zero")
        self._weights, self._head_bits, self._random = weights, head_bits, random

    def __getitem__(self, name: str) -> Linear | Floats:
        weight = self._weights[name]
        form, kind = self._form, self._kind
        if name in ("embed", "head") and self._head_bits:
            form, kind = (self._head_bits, 32, False), ""
        elif not name.startswith("layers.") or weight.ndim != 2:
            return weight
        if self._random:
            rows, columns = weight.shape
            matrix = drawn((rows, columns), *form)
        else:
            matrix = rounded(np.asarray(weight, np.float32), *form)
        return stored(matrix, kind, self._random)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def model_of(options: argparse.Namespace) -> tuple[ModelConfig, Mapping[str, Linear | Floats]]:
    """Return the shape and the weights to round."""
    if options.file:
        model = load(options.file)
        return model.config, model.weights
    shape = SHAPES[options.shape]
    shape = replace(shape, vocab_size=options.vocabulary or shape.vocab_size)
    return shape, RandomWeights(shape)


def measure(
    engines: Mapping[str, NativeEngine], sizes: list[int], rounds: int
) -> dict[str, dict[int, float]]:
    """Return median milliseconds of a pass over n tokens; engines take turns."""
    times: dict[str, dict[int, list[float]]] = {name: {n: [] for n in sizes} for name in engines}
    sequences = {name: engine.start(draw(engine, 64)) for name, engine in engines.items()}
    for turn in range(rounds + 1):
        for n in sizes:
            for name, engine in engines.items():
                tree = TokenTree.chain(draw(engine, n))
                for _ in range(3):
                    start = time.perf_counter()
                    engine.forward([(sequences[name], tree)])
                    if turn:
                        times[name][n].append(1e3 * (time.perf_counter() - start))
    return {
        name: {n: statistics.median(each) for n, each in of.items()} for name, of in times.items()
    }


def main() -> None:
    """Print a table of times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?")
    parser.add_argument("--forms", nargs="+", default=["8:32", "4:128", "3:128"])
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--vocabulary", type=int, help="tokens; the shape's own by default")
    parser.add_argument("--act", nargs="+", default=["int16", "int8"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 8, 12, 16])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--head-bits", type=int, default=0)
    parser.add_argument("--random", action="store_true")
    options = parser.parse_args()
    config, weights = model_of(options)
    engines = {}
    for form in options.forms:
        for act in options.act:
            made = AsIntegers(weights, form, options.head_bits, options.random or not options.file)
            engines[f"{form} {act}"] = NativeEngine(
                config, made, options.threads, format=f"auto:act={act}"
            )
    found = measure(engines, options.sizes, options.rounds)
    print("| form | format | MB | gain | " + " | ".join(f"{n}" for n in options.sizes) + " |")
    print("|---" * (4 + len(options.sizes)) + "|")
    whole = next(iter(found.values()))[options.sizes[0]]
    for name, times in found.items():
        engine = engines[name]
        cells = " | ".join(f"{times[n]:.2f} ({times[n] / times[1]:.2f})" for n in options.sizes)
        size, gain = (engine.weight_bytes or 0) / 1e6, whole / times[options.sizes[0]]
        print(f"| {name} | {engine.format} | {size:.1f} | {gain:.3f} | {cells} |")


if __name__ == "__main__":
    main()
