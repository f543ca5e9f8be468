"""T-MAC's look-up of bit planes beside our grouped kernels, for one token, from memory.

    python benchmarks/lookup.py [--bits 2 3 4] [--groups 32 128] [--inputs 1536] [--megabytes 100]
        [--threads 2] [--rounds 9]

`lookup.cpp` is compiled with `c++`, and run in turns with our engine, whose head is the matrix (see
`kernels.py`). Weights in a second, in billions; ours round activations to 16 and to 8 bits. Needs
AVX-512BW.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from grouped import drawn
from kernels import matrix, passes, rounds
from step import SHAPES, RandomWeights

from paceline.core import Floats
from paceline.engines.native import NativeEngine, default_threads
from paceline.models.config import ModelConfig
from paceline.models.tensors import Linear

ROWS = 128  # of a panel
SOURCE = Path(__file__).with_name("lookup.cpp")


class HeadOfIntegers(Mapping[str, Linear | Floats]):
    """The smallest model, whose head has integers in groups."""

    def __init__(self, config: ModelConfig, bits: int, group: int) -> None:
        self._weights = RandomWeights(config)
        self._shape, self._form = (config.vocab_size, config.hidden_size), (bits, group)

    def __getitem__(self, name: str) -> Linear | Floats:
        """Return a weight."""
        if name in ("embed", "head"):
            return drawn(self._shape, *self._form, False)
        return self._weights[name]

    def __iter__(self):
        """Yield the names of the weights."""
        return iter(self._weights)

    def __len__(self) -> int:
        """Return how many weights there are."""
        return len(self._weights)


def ours(bits: int, group: int, options: argparse.Namespace) -> list[float]:
    """Return weights in a second with activations of 16 and of 8 bits."""
    inputs = options.inputs
    rows = int(options.megabytes * 1e6 / (inputs * bits / 8 + inputs / group * 2))
    config = matrix(SHAPES["135m"], inputs, max(rows // ROWS, 1) * ROWS)
    jobs = {}
    for act in ("int16", "int8"):
        weights = HeadOfIntegers(config, bits, group)
        engine = NativeEngine(config, weights, options.threads, format=f"auto:act={act}")
        jobs[act] = passes(engine, (1,))[1]
    times = rounds(jobs, options.rounds)
    return [config.vocab_size * inputs / times[act] for act in jobs]


def main() -> None:
    """Compile, measure in turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bits", nargs="+", type=int, choices=(2, 3, 4), default=[2, 3, 4])
    parser.add_argument("--groups", nargs="+", type=int, choices=(32, 64, 128), default=[32, 128])
    parser.add_argument("--inputs", type=int, default=1536)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    cpu = Path("/proc/cpuinfo")
    if "avx512bw" not in (cpu.read_text() if cpu.is_file() else "") or not shutil.which("c++"):
        print(f"needs c++ and AVX-512BW, which {platform.processor() or 'this machine'} lacks")
        return
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "lookup"
        flags = ["-O3", "-march=icelake-server", "-std=c++20", "-pthread"]
        subprocess.run(["c++", *flags, SOURCE, "-o", program], check=True)
        print("| bits | group | ours, int16 | ours, int8 | look-up | error of look-up |")
        print("|---:|---:|---:|---:|---:|---:|")
        for bits in options.bits:
            for group in options.groups:
                words = [bits, group, options.inputs, options.megabytes, options.threads]
                done = subprocess.run(
                    [program, *map(str, [*words, options.rounds])],
                    check=True,
                    capture_output=True,
                    text=True,
                )
                speed, error = map(float, done.stdout.split())
                known = " | ".join(f"{each / 1e9:.1f}" for each in ours(bits, group, options))
                print(f"| {bits} | {group} | {known} | {speed:.1f} | {error:.4f} |", flush=True)


if __name__ == "__main__":
    main()
