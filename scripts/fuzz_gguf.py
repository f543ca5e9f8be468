"""Mutates GGUF files and loads each: a ModelError or a model, never anything else.

    python scripts/fuzz_gguf.py [FILE.gguf ...] --mutations 200000

The seeds are small files of every architecture and block type, and the metadata and tensors of the
named files with their vocabulary cut. Each is changed at the places of its counts, lengths, types,
sizes and offsets, at random bytes, by truncation, or by parts of itself or of another seed. A model
that loads has all its weights read and its tokenizer built; with --native it is put into the native
engine and run for some tokens. To check the native module for wrong memory accesses, run this as
`scripts/sanitize.sh scripts/fuzz_gguf.py --native --mutations 20000`.

Each process may grow by --memory MiB over its first 200 files; mutants take at most 1 MiB.
"""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
from gguf_mutants import mutant, seeds

from paceline.core import TokenTree
from paceline.errors import PacelineError
from paceline.models import Model, load

SECONDS = 20  # that one file may take
WARM = 200  # files before memory is measured


def use(model: Model, native: bool) -> None:
    """Run the model, read every weight, and build the tokenizer."""
    if native and model.config.context <= 1 << 16:
        from paceline.engines.native import NativeEngine

        engine = NativeEngine(model.config, model.weights, threads=1, format="auto")
        tree = TokenTree.chain(np.arange(5) % model.config.vocab_size)
        engine.forward([(engine.open(), tree)])
    for name in model.weights:
        model.weights.dense(name)
    model.tokenizer.encode("ABC hello")


def check(path: Path, native: bool) -> str:
    """Return what became of one file, in a word."""
    opened = False
    try:
        model = load(path)
        opened = True
        use(model, native)
    except PacelineError as error:
        message = str(error)
        if "\n" in message or len(message) > 1000:
            raise AssertionError(f"no sentence: {message!r:.500}") from error
        return "refused in use" if opened else "refused"
    return "loaded"


def peak() -> int:
    """Largest memory of this process, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(number: int, options: argparse.Namespace, results: Any, note: Any) -> None:
    """Check the mutants of one process."""
    faulthandler.enable()
    made = seeds(options.files)
    counts: Counter[str] = Counter()
    base, start = 0, time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-gguf-", dir=options.folder))
    path = folder / "mutant.gguf"
    for done in range(-len(made), options.mutations // options.processes + 1):
        which = number + done * options.processes if done >= 0 else done
        note.value = which
        data = mutant(options.seed, which, made) if done >= 0 else made[done].data
        path.write_bytes(data)
        began = time.monotonic()
        try:
            outcome = check(path, options.native)
        except BaseException as error:  # whatever is no PacelineError is what is looked for
            kept = options.folder / f"fuzz-gguf-{options.seed}-{which}.gguf"
            kept.write_bytes(data)
            results.put((number, "failed", f"{type(error).__name__}: {error}; kept as {kept}"))
            raise
        if done < 0 and outcome != "loaded":
            results.put((number, "failed", f"seed {made[done].name} was {outcome}"))
            return
        took = time.monotonic() - began
        if took > SECONDS * (10 if options.native else 1):
            results.put((number, "failed", f"mutant {which} took {took:.0f} s"))
            return
        counts[outcome] += done >= 0
        if done == WARM:
            base = peak()
        grown = peak() - (base or peak())
        if grown > options.memory << 20:
            kept = options.folder / f"fuzz-gguf-{options.seed}-{which}.gguf"
            kept.write_bytes(data)
            results.put((number, "failed", f"mutant {which} took {grown >> 20} MiB; {kept}"))
            return
        if done == options.mutations // options.processes or (done > 0 and done % 1000 == 0):
            results.put((number, "counts", (dict(counts), grown >> 20)))
            counts.clear()
    path.unlink()
    folder.rmdir()
    results.put((number, "done", time.monotonic() - start))


def main() -> None:
    """Run the processes and add up."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="real files that become seeds, too")
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", type=int, default=64, help="MiB that a process may grow by")
    parser.add_argument("--native", action="store_true", help="run what loads in the native engine")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()
    notes = [context.Value("q", 0) for _ in range(options.processes)]
    running = {
        number: context.Process(target=work, args=(number, options, results, notes[number]))
        for number in range(options.processes)
    }
    for process in running.values():
        process.start()
    sys.exit(collect(results, running, notes))


def collect(results: Any, running: dict[int, Any], notes: Sequence[Any]) -> int:
    """Print the sums; return the exit code."""
    counts: Counter[str] = Counter()
    grown, failed, start = 0, 0, time.monotonic()
    while running:
        try:
            number, kind, value = results.get(timeout=5)
        except Empty:  # has a process died?
            for number, process in list(running.items()):
                if not process.is_alive():
                    print(f"process {number} died at mutant {notes[number].value}", flush=True)
                    failed += 1
                    del running[number]
            continue
        if kind == "counts":
            counts.update(value[0])
            grown = max(grown, value[1])
            print(f"\r{sum(counts.values())} files", end="", file=sys.stderr, flush=True)
        else:
            if kind == "failed":
                print(value, flush=True)
                failed += 1
            running[number].join()
            del running[number]
    seconds = time.monotonic() - start
    shown = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    print(f"{sum(counts.values())} mutants in {seconds:.0f} s: {shown}; memory grew by {grown} MiB")
    return 1 if failed else 0


if __name__ == "__main__":
    main()
