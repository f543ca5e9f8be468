"""A model that does not fit into memory: its layers stream from disk, with trees and without.

    python benchmarks/streaming.py MODEL --weights-memory 300MB --limit 600MB --prompts FILE

Every arm runs in a process of its own, cold: plain decoding (a budget of 0) and the default
(`blend` with trees sized by measured cost), with layers streamed under the limit, then plain with
all weights in memory, without a limit, whose tokens the others must equal. `--limit` is a hard one:
RLIMIT_DATA of the process, memory for Python, weights, keys and values and all else that is not a
mapped file; the largest resident memory, mapped files included, is printed beside it. `--batch N`
runs N prompts in one batch, too, and compares the tokens a second with one at a time. `--drafters`
adds streamed arms with other drafters. `--peer` adds llama.cpp on a memory map of the same file,
see `streaming_peer.py`: once all of it is dropped before each pass, once all but its first
`--weights-memory` bytes; its tokens need not be the same, as its kernels round otherwise.

The floor is the time to read the streamed layers once a token, at the speed of direct reads of
4 MiB, two at a time, measured on a file of the same folder before each arm.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap
from pathlib import Path
from time import perf_counter
from typing import Any

from streaming_peer import run_mapped

from paceline import LM
from paceline.byte_sizes import Size
from paceline.cache_dir import cache_folder
from paceline.machine import peak_bytes
from paceline.measuring.prompts import read_prompts

_PIECE, _READERS = 4 << 20, 2
# Threads and arenas of libraries reserve data that nobody uses, which the limit would count.
LEAN = {
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": "262144",
}
ARMS = {"streamed, plain": (0, True), "streamed, default": ("auto", True), "whole": (0, False)}
DRAFTER = "streamed, "  # and the drafter of an arm of `--drafters`
PEERS = ("llama.cpp, all dropped", "llama.cpp, some kept")


def read_speed(megabytes: int) -> float:
    """Return bytes a second of reads in the cache folder, direct ones where it has them."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"read-speed-{os.getpid()}"
    pieces = max(1, (megabytes << 20) // _PIECE)
    try:
        with path.open("wb") as file:
            for _ in range(pieces):
                file.write(os.urandom(_PIECE))
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            descriptor = os.open(path, os.O_RDONLY)

        def read(first: int) -> None:
            room = mmap(-1, _PIECE)
            for piece in range(first, pieces, _READERS):
                os.preadv(descriptor, [room], piece * _PIECE)

        seconds = float("inf")
        for _ in range(3):
            start = perf_counter()
            with ThreadPoolExecutor(_READERS) as pool:
                list(pool.map(read, range(_READERS)))
            seconds = min(seconds, perf_counter() - start)
        os.close(descriptor)
    finally:
        path.unlink(missing_ok=True)
    return pieces * _PIECE / seconds


def read_texts(path: Path) -> list[str]:
    """Return the first turns of a prompt file, or the tasks of MBPP."""
    if path.name != "mbpp.jsonl":
        return [each.turns[0] for each in read_prompts(path)]
    rows = map(json.loads, path.read_text().splitlines())
    return [f"{row['text']}\nYour code should pass: {row['test_list'][0]}" for row in rows]


def run_arm(asked: argparse.Namespace, arm: str) -> dict[str, Any]:
    """Generate all texts in this process; see the module's docstring."""
    texts = read_texts(asked.prompts)[asked.skip :][: asked.count]
    if arm in PEERS:
        keep = 0 if arm == PEERS[0] else int(Size.parse(asked.weights_memory))
        return run_mapped(asked, texts, keep)
    budget, streamed = ARMS.get(arm, ("auto", True))
    drafter = None if arm in ARMS else arm.removeprefix(DRAFTER)
    speed = read_speed(asked.megabytes) if streamed else None
    if streamed and asked.limit:
        limit = int(Size.parse(asked.limit))
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    start = perf_counter()
    memory = asked.weights_memory if streamed else None
    options: dict[str, Any] = {"drafter": drafter} if drafter else {}
    with LM(
        asked.model, budget=budget, weights_memory=memory, threads=asked.threads, **options
    ) as lm:
        load = perf_counter() - start
        outputs = [
            lm.generate(
                [{"role": "user", "content": each}] if asked.chat else each,
                max_new_tokens=asked.tokens,
                temperature=0,
            )
            for each in texts
        ]
        seconds = [each.seconds for each in outputs]
        result: dict[str, Any] = {
            "load": load,
            "prefill": sum(each.prefill for each in seconds),
            "total": sum(each.prefill + each.decode for each in seconds),
            "tokens": [list(map(int, each.tokens)) for each in outputs],
            "passes": sum(each.passes for each in outputs),
            "streamed_bytes": lm.engine.streamed_bytes,
            "read_speed": speed,
        }
        if streamed and asked.batch:
            result["batch"] = _batch(lm, asked, texts)
        report = getattr(lm.budget, "report", None)
        result["governor"] = report() if report else None
        result["peak"] = peak_bytes()
    return result


def _batch(lm: LM, asked: argparse.Namespace, prompts: list[str]) -> dict[str, float]:
    several = [prompts[i % len(prompts)] for i in range(asked.batch)]
    start = perf_counter()
    outputs = lm.generate(several, max_new_tokens=asked.tokens, ignore_eos=True)
    seconds = perf_counter() - start
    return {"tokens_per_second": sum(len(each.tokens) for each in outputs) / seconds}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--weights-memory", required=True)
    parser.add_argument("--limit")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--chat", action="store_true", help="use the chat template")
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--megabytes", type=int, default=256, help="of the file for the read speed")
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--drafters", nargs="+", default=[], metavar="SPEC")
    parser.add_argument("--peer", action="store_true", help="llama.cpp, too")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.arm:
        print(json.dumps(run_arm(asked, asked.arm)))
        return
    results: dict[str, dict[str, Any]] = {}
    print("| arm | load s | tokens/s | prefill s | passes | tokens/pass | floor | peak MB |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    arms = [*asked.arms, *(DRAFTER + each for each in asked.drafters)]
    for arm in [*arms, *(PEERS if asked.peer else ())]:
        words = [sys.executable, __file__, *sys.argv[1:], "--arm", arm]
        done = subprocess.run(words, capture_output=True, text=True, env=os.environ | LEAN)
        if done.returncode:
            raise SystemExit(f"{arm}: {done.stderr[-2000:]}")
        results[arm] = result = json.loads(done.stdout.splitlines()[-1])
        print(_row(arm, result), flush=True)
        if asked.json:
            asked.json.write_text(json.dumps(results, indent=1))
    _compare(results)


def _row(arm: str, result: dict[str, Any]) -> str:
    tokens = sum(map(len, result["tokens"]))
    floor = "-"
    if result["read_speed"]:
        floor = f"{result['streamed_bytes'] / result['read_speed']:.3f} s a pass"
    return (
        f"| {arm} | {result['load']:.1f} | {tokens / result['total']:.2f} | "
        f"{result['prefill']:.1f} | {result['passes']} | {tokens / result['passes']:.2f} | "
        f"{floor} | {result['peak'] / 1e6:.0f} |"
    )


def _compare(results: dict[str, dict[str, Any]]) -> None:
    for arm in PEERS:
        if arm in results:
            read = results[arm]["streamed_bytes"] / 1e6
            print(f"{arm}: a pass reads {read:.0f} MB.")
    results = {arm: result for arm, result in results.items() if arm not in PEERS}
    tokens = {arm: result["tokens"] for arm, result in results.items()}
    if any(each != next(iter(tokens.values())) for each in tokens.values()):
        raise SystemExit("the arms differ in their tokens")
    print(f"\nAll {len(results)} arms give the same tokens.")
    for arm, result in results.items():
        if result["read_speed"]:
            decode = result["total"] - result["prefill"]
            floor = result["streamed_bytes"] / result["read_speed"]
            print(f"{arm}: a pass takes {decode / result['passes'] / floor:.2f}x its floor.")
        if "batch" in result:
            alone = sum(map(len, result["tokens"])) / result["total"]
            ratio = result["batch"]["tokens_per_second"] / alone
            print(f"{arm}: a batch gives {ratio:.1f}x the tokens a second of one at a time.")
    plain, default = (results.get(f"streamed, {kind}") for kind in ("plain", "default"))
    if plain and default:
        print(f"default beside plain, prompts counted: {plain['total'] / default['total']:.2f}x.")


if __name__ == "__main__":
    main()
