"""An endless dialogue in constant memory: what is lost of the text, and what is remembered.

    python benchmarks/endless_dialogue.py MODEL [--data FOLDER] [--tokens 100000] [--rows 2048]
        [--chunk 256] [--methods window sirllm infllm] [--far 512] [--host-blocks 256] [--json FILE]

Turns of books follow one another; between them numbers are named, which are asked for `ASKED`
tokens later, beside the dialogue. Before a chunk would exceed `rows` rows, a method chooses which
stay. They move together: keys are turned to their new positions, so that no position exceeds
`rows`, however long the dialogue is (StreamingLLM, Xiao et al., arXiv 2309.17453, section 3.2).

- `window`: the first positions and the last half.
- `sirllm`: besides these the tokens that surprised the model most, which fade (Yao et al., arXiv
  2405.12528, section 3).
- `infllm`: what leaves the window goes to host memory in blocks of 64, at most `host-blocks` of
  them, and each layer takes those back whose mean keys fit the last queries best (after Xiao et
  al., arXiv 2402.04617, section 3).

Each tenth of the dialogue is a line: loss a token, memory of pages and host, tokens a second, which
mean something on an idle machine only, and tokens a second of the processor's time. Questions are
not counted in them.
"""

from __future__ import annotations

import argparse
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from paceline import LM
from paceline.core import Floats, TokenTree
from paceline.engines.base import Engine
from paceline.measuring.evaluation.data import find_file, is_text, read_rows
from paceline.models.rope import Rope
from paceline.scoring import token_logprobs

SHARED = Path(__file__).resolve().parents[2] / "shared"
ASKED = (200, 2000, 10000)  # tokens between a number and its question
SINKS, BLOCK = 4, 64
_EVERY = 600  # tokens between two numbers
_DECAY = 0.7  # of surprisal, for every `rows` tokens since
_NAMES = ("north", "south", "east", "west", "garden", "kitchen", "cellar", "attic", "stable")

Rows = list[tuple[Floats, Floats]]  # keys and values of each layer, [H_kv, N, D]


def turn(rope: Rope | None, keys: Floats, by: NDArray[np.int64]) -> Floats:
    """Return keys [..., N, D] as they are `by` [N] positions further on."""
    if rope is None:
        return keys
    half = rope.dim // 2
    angles = by[:, None] * rope.frequencies.astype(np.float64)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    one = slice(0, rope.dim, 2) if rope.adjacent else slice(0, half)
    other = slice(1, rope.dim, 2) if rope.adjacent else slice(half, rope.dim)
    turned = keys.copy()
    turned[..., one] = keys[..., one] * cos - keys[..., other] * sin
    turned[..., other] = keys[..., other] * cos + keys[..., one] * sin
    return turned


class Stream(ABC):
    """A dialogue that an engine reads in at most `rows` rows.

    Attributes:
        host_bytes: memory outside of the engine's pages.
        name: of the method.
    """

    host_bytes = 0
    name = ""

    def __init__(self, engine: Engine, rows: int) -> None:
        self.engine, self.rows, self.sequence = engine, rows, engine.open()
        self.ropes = [layer.rope for layer in engine.config.layers]
        self.surprisal = np.empty(0)  # of the token of each row
        self.ages = np.empty(0)  # tokens since each row was read
        self._last: NDArray[np.float64] | None = None  # logits behind the last row
        self._tokens = np.empty(0, np.int32)

    def read(self, tokens: NDArray[np.int32]) -> NDArray[np.float64]:
        """Return the surprisal of each token of the next chunk, nan for the very first one."""
        if self.sequence.length + len(tokens) > self.rows:
            self.compact(len(tokens))
        self._tokens = tokens
        logits = self.engine.forward([(self.sequence, TokenTree.chain(tokens))])
        before = logits[:-1] if self._last is None else np.vstack([self._last[None], logits[:-1]])
        found = -token_logprobs(before, tokens[-len(before) :])
        self._last = logits[-1].copy()
        self.engine.commit(self.sequence, np.arange(len(tokens), dtype=np.int32))
        found = np.r_[[np.nan] * (len(tokens) - len(found)), found]
        self.surprisal = np.r_[self.surprisal, np.nan_to_num(found)]
        self.ages = np.r_[self.ages + len(tokens), np.arange(len(tokens))[::-1]]
        return found

    def ask(self, question: Sequence[int], answer: Sequence[int]) -> float:
        """Return nats a token of an answer, beside the dialogue."""
        tokens = np.array([*question, *answer], np.int32)
        fork = self.engine.fork(self.sequence)
        logits = self.engine.forward([(fork, TokenTree.chain(tokens))])
        self.engine.release(fork)
        return -float(
            token_logprobs(logits[len(question) - 1 : -1], tokens[len(question) :]).mean()
        )

    def close(self) -> None:
        """Give the pages back."""
        self.engine.release(self.sequence)

    @abstractmethod
    def compact(self, room: int) -> None:
        """Let at least `room` rows be free."""

    def held(self, kept: NDArray[np.int64], first: int) -> Rows:
        """Return kept rows as they are at positions from `first` on."""
        by = first + np.arange(len(kept)) - kept
        rows = []
        for index, rope in enumerate(self.ropes):
            keys, values = self.engine.keys_values(self.sequence, index)
            rows.append((turn(rope, keys[:, kept], by), values[:, kept]))
        return rows

    def replace(self, parts: Sequence[Rows], kept: NDArray[np.int64]) -> None:
        """Make the sequence anew of some rows; `kept` says of which older ones they are."""
        fresh = self.engine.open()
        for rows in parts:
            if rows[0][0].shape[1]:
                pairs = [(np.ascontiguousarray(k), np.ascontiguousarray(v)) for k, v in rows]
                self.engine.append_rows(fresh, pairs)
        self.engine.release(self.sequence)
        self.sequence = fresh
        self.surprisal, self.ages = self.surprisal[kept], self.ages[kept]


class Window(Stream):
    """Keeps the first rows and the last half."""

    name = "window"

    def compact(self, room: int) -> None:
        """Drop what lies between."""
        kept = self.choose(self.sequence.length, min(self.rows // 2, self.rows - room))
        self.replace([self.held(kept, 0)], kept)

    def choose(self, length: int, count: int) -> NDArray[np.int64]:
        """Return which rows stay, in order."""
        return np.r_[:SINKS, length - count + SINKS : length]


class SirLLM(Window):
    """Keeps the first rows, a quarter for the last ones, and the most surprising of the others."""

    name = "sirllm"

    def choose(self, length: int, count: int) -> NDArray[np.int64]:
        """Return which rows stay, in order."""
        worth = self.surprisal * _DECAY ** (self.ages / self.rows)
        worth[:SINKS] = worth[length - count // 2 :] = np.inf
        return np.sort(np.argsort(-worth, kind="stable")[:count])


class InfLLM(Stream):
    """Keeps the first rows and a window, and takes fitting blocks back from host memory."""

    name = "infllm"

    def __init__(self, engine: Engine, rows: int, far: int, host_blocks: int) -> None:
        super().__init__(engine, rows)
        self.far, self.limit, self.blocks = far // BLOCK, host_blocks, list[Rows]()
        self.taken = 0  # rows that were taken back, behind the first ones

    def compact(self, room: int) -> None:
        """Store what leaves the window, and take the best blocks into the rows behind the first."""
        length, near = self.sequence.length, SINKS + self.taken
        window = min(self.rows // 2, self.rows - room) - SINKS - self.far * BLOCK
        leaving = (length - near - window) // BLOCK
        for start in range(near, near + leaving * BLOCK, BLOCK):
            self.blocks.append(_halved(self.held(np.arange(start, start + BLOCK), 0)))
        del self.blocks[: -self.limit]
        self.host_bytes = sum(_bytes(block) for block in self.blocks)
        best = self.look_up()
        self.taken = len(best[0]) * BLOCK if best else 0
        start = near + leaving * BLOCK
        parts = [self.held(np.arange(SINKS), 0)]
        for place in range(self.taken // BLOCK):
            parts.append(self.block([chosen[place] for chosen in best], SINKS + place * BLOCK))
        parts.append(self.held(np.arange(start, length), SINKS + self.taken))
        self.replace(parts, np.r_[np.zeros(SINKS + self.taken, np.int64), start:length])

    def block(self, chosen: Sequence[int], first: int) -> Rows:
        """Return for each layer the block that it chose, at positions from `first` on."""
        by = np.full(BLOCK, first)
        rows = []
        for index, number in enumerate(chosen):
            keys, values = (each.astype(np.float32) for each in self.blocks[number][index])
            rows.append((turn(self.ropes[index], keys, by), values))
        return rows

    def look_up(self) -> list[NDArray[np.int64]]:
        """Return for each layer which blocks fit the last tokens best, in their order."""
        count = min(self.far, len(self.blocks))
        if not count or not len(self._tokens):
            return []
        probe, tokens = self.engine.open(), self._tokens[-BLOCK:]
        self.engine.track_queries(probe, len(tokens))
        self.engine.extend(probe, tokens)
        best = []
        for index, rope in enumerate(self.ropes):
            queries = self.engine.recent_queries(probe, index)  # [H, W, D]
            plain = turn(rope, queries, -np.arange(queries.shape[1])).mean(1)
            inside = np.arange(BLOCK)
            means = [turn(rope, block[index][0].astype(np.float32), -inside).mean(1)
                     for block in self.blocks]  # fmt: skip
            heads = np.array(means).repeat(len(plain) // len(means[0]), 1)  # [blocks, H, D]
            scores = np.einsum("bhd,hd->b", heads, plain)
            best.append(np.sort(np.argsort(-scores, kind="stable")[:count]))
        self.engine.release(probe)
        return best


def _halved(rows: Rows) -> Rows:
    half = np.finfo(np.float16)
    return [
        tuple(np.clip(each, half.min, half.max).astype(np.float16) for each in layer)  # type: ignore[misc]
        for layer in rows
    ]


def _bytes(rows: Rows) -> int:
    return sum(each.nbytes for layer in rows for each in layer)


def dialogue(lm: LM, data: Path, tokens: int) -> Iterator[tuple[NDArray[np.int32], str, str]]:
    """Yield turns of about `_EVERY` tokens, each with a name and the number that it ends with."""
    path = find_file(data, "long", "long*.jsonl", "*books*.jsonl", "*.jsonl")
    rng, done, turn_number = np.random.default_rng(0), 0, 0
    for row in read_rows(path, {"text": is_text}):
        text = lm.tokenizer.encode(row["text"][: 6 * tokens], False)
        for start in range(0, len(text) - _EVERY, _EVERY):
            place = f"{_NAMES[turn_number % len(_NAMES)]} {turn_number // len(_NAMES) + 1}"
            number = str(rng.integers(10000, 99999))
            fact = lm.tokenizer.encode(f" The number of the {place} is {number}.\n", False)
            yield np.array([*text[start : start + _EVERY], *fact], np.int32), place, number
            done, turn_number = done + _EVERY + len(fact), turn_number + 1
            if done >= tokens:
                return


def run(lm: LM, stream: Stream, options: argparse.Namespace) -> dict[str, object]:
    """Read the dialogue; return losses, memory, answers and times of each tenth."""
    encode = lm.tokenizer.encode
    due: list[tuple[int, int, str, str]] = []
    losses: list[float] = []
    answers: dict[int, list[float]] = {distance: [] for distance in ASKED}
    tenths: list[dict[str, float]] = []
    seconds, busy, read, tenth = 0.0, 0.0, 0, max(1, options.tokens // 10)
    for tokens, place, number in dialogue(lm, options.data, options.tokens):
        for start in range(0, len(tokens), options.chunk):
            part = tokens[start : start + options.chunk]
            begun, worked = time.perf_counter(), time.process_time()
            losses += stream.read(part).tolist()
            seconds += time.perf_counter() - begun
            busy += time.process_time() - worked
            read += len(part)
        due += [(read + distance, distance, place, number) for distance in ASKED]
        for entry in [entry for entry in due if entry[0] <= read]:
            due.remove(entry)
            question = encode(f" Question: What is the number of the {entry[2]}?\nAnswer:", False)
            answers[entry[1]].append(stream.ask(question, encode(f" {entry[3]}", False)))
        if read >= tenth * (len(tenths) + 1):
            pages = stream.engine.memory
            tenths.append({
                "tokens": read,
                "loss": float(np.nanmean(losses)),
                "rows": stream.sequence.length,
                "megabytes": (pages.used * pages.page_bytes + stream.host_bytes) / 1e6,
                "tokens_a_second": len(losses) / seconds,
                "tokens_a_processor_second": len(losses) / busy,
            })  # fmt: skip
            losses, seconds, busy = [], 0.0, 0.0
            print(stream.name, json.dumps(tenths[-1]), flush=True)
    recalled = {str(d): float(np.mean(each)) for d, each in answers.items() if each}
    return {"tenths": tenths, "nats_a_token_of_answers": recalled}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, default=SHARED / "text")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--far", type=int, default=512)
    parser.add_argument("--host-blocks", type=int, default=256)
    parser.add_argument("--methods", nargs="+", default=["window", "sirllm", "infllm"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {}
    with LM(options.model, threads=options.threads) as lm:
        for name in options.methods:
            made: Stream
            if name == "infllm":
                made = InfLLM(lm.engine, options.rows, options.far, options.host_blocks)
            else:
                made = {"window": Window, "sirllm": SirLLM}[name](lm.engine, options.rows)
            results[name] = run(lm, made, options)
            made.close()
            print(name, json.dumps(results[name]), flush=True)
            if options.json:
                options.json.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
