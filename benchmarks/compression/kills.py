r"""Kill a compression at random moments until it is done, and compare the result with a whole run.

    python benchmarks/compression/kills.py MODEL --recipe gptq:bits=3,group=32+eora:rank=2 \
        [--kills 20] [--calibration FILE] [--rows 8 --length 128] [--seed 0]

`paceline compress` runs in processes of its own. One run is left alone; then the same command is
given again and again, and each process gets SIGKILL at a moment drawn evenly from the time between
the first file of its work and its end in the run that was left alone. Where a process ends before
its kill, its folder is compared with that of the first run, file by file and bit by bit (the card,
which has times in it, is left out), and the command starts anew with another folder. Nothing else
may be left behind.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep

CARDS = ("card.json", "card.md")
POLL = 0.002  # seconds between looks at the work folder


@dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
        seconds: after the start of the process.
        blocks: that were finished then; None before there is a work folder.
    """

    seconds: float
    blocks: int | None


@dataclass(frozen=True)
class Command:
    """What is given again and again.

    Attributes:
        model: the source.
        options: of `paceline compress`.
    """

    model: str
    options: tuple[str, ...]

    def start(self, out: Path) -> subprocess.Popen[str]:
        """Start a process that writes a folder."""
        words = ["compress", self.model, str(out), *self.options]
        call = [sys.executable, "-c", "from paceline.cli import main; main()", *words]
        return subprocess.Popen(
            call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8"
        )

    def run(self, out: Path, until: float | None = None) -> tuple[bool, float, float]:
        """Run a process to its end, or kill it after so many seconds.

        Returns:
            whether it ended by itself, the seconds until its work folder was there (until its end
            if there was none), and those until its end.

        Raises:
            SystemExit: it failed.
        """
        begin, state = perf_counter(), work_folder(out) / "job.json"
        process, began = self.start(out), 0.0
        while process.poll() is None:
            passed = perf_counter() - begin
            if until is not None and passed >= until:
                process.kill()
                break
            if state.exists():
                began = began or passed
            sleep(POLL)
        _, said = process.communicate()
        if process.returncode not in (0, -9):
            raise SystemExit(f"the command failed with {process.returncode}: {said[-2000:]}")
        whole = perf_counter() - begin
        return process.returncode == 0, began or whole, whole


def work_folder(out: Path) -> Path:
    """Return where unfinished work of a folder is kept."""
    return out.with_name(f".{out.name}.partial")


def finished(out: Path) -> int | None:
    """Return how many blocks the work folder of a folder holds; None where there is none."""
    folder = work_folder(out)
    return len([*folder.glob("block-*.safetensors")]) if folder.is_dir() else None


def contents(out: Path) -> dict[str, bytes]:
    """Return what was written, without the card."""
    return {file.name: file.read_bytes() for file in out.iterdir() if file.name not in CARDS}


def check(out: Path, wanted: dict[str, bytes]) -> None:
    """Compare a finished folder with that of the run that was left alone.

    Raises:
        SystemExit: a file differs, is missing or was left over.
    """
    found = contents(out)
    different = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    if different:
        raise SystemExit(f"{out} differs from a whole run in {', '.join(different)}")
    if work_folder(out).exists():
        raise SystemExit(f"{work_folder(out)} was left behind")


def kill_again_and_again(
    command: Command, folder: Path, count: int, seed: int
) -> tuple[list[Kill], int]:
    """Return `count` kills, and how many finished folders were compared.

    Raises:
        SystemExit: the command failed, or a folder differs.
    """
    _, first, whole = command.run(folder / "whole")
    wanted = contents(folder / "whole")
    moments, kills, compared = random.Random(seed), list[Kill](), 0
    while True:
        out = folder / f"out-{compared}"
        moment = moments.uniform(first, whole) if len(kills) < count else None
        ended, *times = command.run(out, moment)
        if ended:  # a machine that has become faster would end before every moment
            first, whole = times
        if not ended and not out.is_dir():
            assert moment is not None
            kills.append(Kill(moment, finished(out)))
            continue
        check(out, wanted)
        compared += 1
        if moment is None or (ended and len(kills) >= count):
            return kills, compared


def main() -> None:
    """Print a row for each kill, and what came out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--calibration")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    asked = parser.parse_args()
    options = ["--recipe", asked.recipe, "--no-measure", "--again"]
    for name in ("calibration", "rows", "length", "threads"):
        if getattr(asked, name) is not None:
            options += [f"--{name}", str(getattr(asked, name))]
    with tempfile.TemporaryDirectory() as folder:
        command = Command(asked.model, tuple(options))
        kills, compared = kill_again_and_again(command, Path(folder), asked.kills, asked.seed)
    print("| kill | seconds | blocks finished |")
    print("|---:|---:|---:|")
    for place, kill in enumerate(kills, 1):
        blocks = "no work folder" if kill.blocks is None else kill.blocks
        print(f"| {place} | {kill.seconds:.2f} | {blocks} |")
    print(f"\n{len(kills)} kills; {compared} finished folders, all the same in every bit")


if __name__ == "__main__":
    main()
