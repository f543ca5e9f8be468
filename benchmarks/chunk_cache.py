"""Documents computed apart: what is kept of their use, and the time to the first token.

    python benchmarks/chunk_cache.py MODEL [--contexts 20] [--recompute 0 0.15] [--rounds 5]

Contexts are those of the suite `long` (needles, keys, copied passages), cut into documents where
sentences end. `kept` is the gain in log-probability of the answers over no context at all, relative
to the gain of the context as a whole; with a 95 % interval over contexts. Times are of the first
token behind documents that are stored, in memory and on disk, and behind the same prompt computed
as a whole; they take turns.
"""

from __future__ import annotations

import argparse
import json
import lzma
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
from busy import busy_others, ticks

from paceline import LM
from paceline.core import TokenTree
from paceline.documents.assembly import Assembly, Documents
from paceline.documents.chunk_cache import ChunkCache
from paceline.documents.prompt import sink_of
from paceline.engines.base import Cached
from paceline.machine import machine, versions
from paceline.measuring.evaluation.forest import Branches, score_sequences
from paceline.measuring.evaluation.long_tasks import ContextBuilder, LongContext

BOOKS = Path(__file__).resolve().parents[2] / "shared" / "text" / "classic-books.jsonl.xz"
_CHARACTERS = 20  # of a book for each token


def pieces(lm: LM, tokens: list[int], count: int) -> list[list[int]]:
    """Return a context as documents of about equal size that end where sentences do."""
    step, cuts = len(tokens) / count, [0]
    for number in range(1, count):
        near, reach = round(number * step), int(step / 3)
        ends = [
            at
            for at in range(near - reach, near + reach)
            if lm.tokenizer.token(tokens[at - 1]).rstrip().endswith((".", "!", "?"))
        ]
        cuts.append(min(ends, key=lambda at: abs(at - near), default=near))
    cuts.append(len(tokens))
    return [tokens[a:b] for a, b in pairwise(cuts)]


def assembled(lm: LM, parts: list[list[int]], share: float, cache: ChunkCache) -> Cached:
    """Return a sequence that holds a sink and documents that were computed apart."""
    engine, sink = lm.engine, sink_of(lm.tokenizer)
    documents = Documents(len(sink), tuple(map(len, parts)), sink, share, cache)
    prompt = [*sink, *(token for part in parts for token in part)]
    assembly, sequence = Assembly(engine, documents, prompt), engine.open()
    assembly.load(sequence)
    while assembly.unfinished:
        on, tokens = assembly.part(sequence, 256)
        engine.forward([(on, TokenTree.chain(tokens))], "none")
        assembly.commit(sequence, on, len(tokens))
        assembly.load(sequence)
    return sequence


def answers(lm: LM, sequence: Cached, context: LongContext) -> float:
    """Return the sum of the answers' log-probabilities behind a sequence, which is released."""
    mark = context.questions[0].tokens[:1]
    group = Branches(mark, [question.tokens[1:] for question in context.questions])
    [scores] = score_sequences(lm.engine, [sequence], [group])
    lm.engine.release(sequence)
    pairs = zip(scores, context.questions, strict=True)
    return sum(score.last(question.answer).logprob for score, question in pairs)


def quality(lm: LM, books: list[str], kind: str, options: argparse.Namespace) -> None:
    """Print what is kept of one kind of context."""
    sink = list(sink_of(lm.tokenizer))
    builder = ContextBuilder(lambda text: lm.tokenizer.encode(text, False), [], options.length)
    rows = []
    for number in range(options.contexts):
        rng = np.random.default_rng([number, len(kind)])
        book = books[rng.integers(len(books))]
        size = options.length * _CHARACTERS
        at = int(rng.integers(max(1, len(book) - size)))
        context = getattr(builder, kind)(book[at : at + size], rng)
        parts, cache = pieces(lm, context.tokens, options.documents), ChunkCache(1 << 40)
        whole = np.array([*sink, *context.tokens], np.int32)
        none, full = (
            answers(lm, lm.engine.start(tokens), context) for tokens in (whole[: len(sink)], whole)
        )
        ours = [
            answers(lm, assembled(lm, parts, share, cache), context) for share in options.recompute
        ]
        rows.append([full - none, *(each - none for each in ours)])
    gains = np.array(rows)
    draws = np.random.default_rng(0).integers(len(gains), size=(2000, len(gains)))
    cells = []
    for place in range(1, gains.shape[1]):
        drawn = gains[draws][..., place].sum(1) / gains[draws][..., 0].sum(1)
        low, high = np.quantile(drawn, (0.025, 0.975))
        kept = gains[:, place].sum() / gains[:, 0].sum()
        cells.append(f"{kept:.3f} ({low:.3f} to {high:.3f})")
    print(f"| {kind} | {len(gains)} | {' | '.join(cells)} |", flush=True)


def first_token(lm: LM, prompt: list[int], documents: list[str], share: float) -> float:
    """Return the seconds to the first token."""
    start = perf_counter()
    if documents:
        lm.generate(prompt, documents=documents, recompute=share, max_new_tokens=1)
    else:
        lm.generate(prompt, max_new_tokens=1)
    return perf_counter() - start


def times(lm: LM, text: str, options: argparse.Namespace) -> None:
    """Print the time to the first token behind documents, against that of the whole prompt."""
    builder = lm.request_builder
    tokens = lm.tokenizer.encode(text, False)[: options.length]
    documents = [lm.decode(part) for part in pieces(lm, tokens, options.documents)]
    question = lm.tokenizer.encode("Question: Who is it?\nAnswer:", False)
    whole = list(lm.request(question, documents=documents).prompt)
    with TemporaryDirectory() as folder:
        lm.store_chunks(folder, 1 << 40)
        first_token(lm, question, documents, 0.0)
        builder.chunks.flush()
        stored = builder.chunks.folder
        arms = [("whole", 0.0, False)]
        arms += [(f"recompute {share:g}, in memory", share, True) for share in options.recompute]
        arms += [("recompute 0, on disk", 0.0, True)]
        seconds: dict[str, list[float]] = {name: [] for name, *_ in arms}
        for turn in range(options.rounds + 1):
            for name, share, apart in arms[:: 1 if turn % 2 else -1]:
                if "disk" in name:
                    builder.chunks = ChunkCache(0, stored)
                took = first_token(lm, question if apart else whole, documents * apart, share)
                if "disk" in name:
                    lm.store_chunks(folder, 1 << 40)
                    first_token(lm, question, documents, 0.0)  # back in memory
                if turn:
                    seconds[name].append(took)
    base = median(seconds["whole"])
    print(f"\n| first token behind {len(whole)} tokens | ms | times faster |\n|---|---:|---:|")
    for name, took in seconds.items():
        print(f"| {name} | {median(took) * 1e3:.0f} | {base / median(took):.1f} |")


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--format", default="auto")
    parser.add_argument("--kv-format", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kinds", nargs="*", default=["single", "multikey", "copy"])
    parser.add_argument("--contexts", type=int, default=20)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--recompute", nargs="+", type=float, default=[0.0, 0.15])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    lm = LM(
        options.model,
        drafter="plain",
        dtype=options.format,
        kv_format=options.kv_format,
        threads=options.threads,
    )
    with lzma.open(BOOKS, "rt", encoding="utf-8") as file:
        books = [json.loads(line)["text"] for line in file]
    books = [book for book in books if len(book) > 2 * _CHARACTERS * options.length]
    start = ticks()
    if options.kinds:
        heads = " | ".join(f"kept, recompute {share:g}" for share in options.recompute)
        print(f"| context | n | {heads} |\n|---|---:|{'---:|' * len(options.recompute)}")
    for kind in options.kinds:
        quality(lm, books, kind, options)
    if options.rounds:
        times(lm, books[0][: options.length * _CHARACTERS], options)
    print(
        f"\n{options.model.name}, {lm.engine.format}, {lm.engine.kv_format} cache, "
        f"{options.threads} threads; others took {busy_others(start, ticks()):.0%} of the cores; "
        f"{machine()['processor']}; Paceline {versions()['commit']}."
    )


if __name__ == "__main__":
    main()
