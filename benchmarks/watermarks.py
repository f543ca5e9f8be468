"""How often watermarks are found where they are, after edits, and where they are not.

    python benchmarks/watermarks.py ../shared/models/stories260K ... [--texts 100] [--tokens 50]

Texts are sampled at temperature 1 without truncation, from beginnings of children's stories, each
with its own seed and its own key, to `--tokens` tokens. A text is marked where p <= 0.01. Edited:
20 % of the tokens in number, at random places, each time a substitution, an insertion or a
deletion, with uniformly random tokens. Through text: decoded, and tokenised again. False positives:
runs of as many tokens of stories that people and other models wrote, from evenly spaced places,
each with a key of its own. Nats a token: mean of -log p of tokens that the model sampled.
"""

from __future__ import annotations

import argparse
import gzip
from math import sqrt
from pathlib import Path
from time import perf_counter

import numpy as np

from paceline import LM
from paceline.control.logits import softmax
from paceline.core import TokenTree
from paceline.watermarks.base import Watermark, parse_watermark

KINDS = ("green", "synthid", "exponential", "exponential,length=64", "inverse")
OPENINGS = ("Once upon a time", "One day, a dog", "The little girl", "Tom and Sam went", "In a big")
LEVEL = 0.01
SHARED = Path(__file__).resolve().parents[2] / "shared"
STORIES = SHARED / "data" / "stories-val" / "soda-tinystories-instruct_val.txt.gz"


def text(lm: LM, seed: int, tokens: int, mark: Watermark | None = None) -> list[int]:
    """One sampled text; a stop token does not end it, so that all are of one length."""
    output = lm.generate(
        OPENINGS[seed % len(OPENINGS)],
        max_new_tokens=tokens,
        temperature=1.0,
        controls={},
        seed=seed,
        ignore_eos=True,
        watermark=mark,
    )
    return output.tokens


def windows(lm: LM, count: int, tokens: int) -> list[list[int]]:
    """Unmarked texts."""
    ids = lm.tokenizer.encode(gzip.decompress(STORIES.read_bytes()).decode(), special=False)
    starts = np.linspace(0, len(ids) - tokens, count).astype(int)
    return [ids[start : start + tokens] for start in starts]


def edited(tokens: list[int], share: float, size: int, random: np.random.Generator) -> list[int]:
    """Return the text after random substitutions, insertions and deletions."""
    found = list(tokens)
    for _ in range(round(share * len(tokens))):
        place, token = int(random.integers(len(found))), int(random.integers(size))
        kind = random.integers(3)
        found[place : place + (kind > 0)] = [] if kind == 2 else [token]
    return found


def surprise(lm: LM, tokens: list[int]) -> float:
    """Mean of -log p of a text's tokens, in nats."""
    sequence = lm.engine.start(np.array(tokens[:1], np.int32), None, 16)
    rows = lm.engine.forward([(sequence, TokenTree.chain(tokens[1:]))])
    lm.engine.release(sequence)
    after = zip(rows[:-1], tokens[2:], strict=True)
    return float(np.mean([-np.log(softmax(row)[token]) for row, token in after]))


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--texts", type=int, default=100)
    parser.add_argument("--plain", type=int, default=2000, help="texts for false positives")
    parser.add_argument("--tokens", type=int, default=50)
    parser.add_argument("--resamples", type=int, default=199)
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    words = parser.parse_args()
    for model in words.models:
        lm = LM(model, drafter="plain", budget=0, threads=1)
        size, random = lm.engine.config.vocab_size, np.random.default_rng(0)
        plain = windows(lm, words.plain, words.tokens)
        nats = np.mean([surprise(lm, text(lm, seed, words.tokens)) for seed in range(50)])
        print(f"\n{Path(model).name}: {nats:.2f} nats a token; {words.tokens} tokens each\n")
        print(
            "| watermark | found | after 20 % edits | through text | false positives | s a text |"
        )
        print("|---|---|---|---|---|---|", flush=True)
        for kind in words.kinds:
            marks = [parse_watermark(f"key=key {i},kind={kind}") for i in range(words.texts)]
            texts = [text(lm, seed, words.tokens, mark) for seed, mark in enumerate(marks)]
            again = [lm.tokenizer.encode(lm.tokenizer.decode(t), special=False) for t in texts]
            start = perf_counter()
            shares = []
            for group in (texts, [edited(t, 0.2, size, random) for t in texts], again):
                pairs = zip(marks, group, strict=True)
                hits = [m.detect(t, words.resamples).p <= LEVEL for m, t in pairs]
                shares.append(f"{np.mean(hits):.1%}")
            seconds = (perf_counter() - start) / (3 * len(texts))
            wrong = 0
            for number, tokens in enumerate(plain):
                mark = parse_watermark(f"key=other {number},kind={kind}")
                wrong += mark.detect(tokens, words.resamples).p <= LEVEL
            error = 1.96 * sqrt(LEVEL * (1 - LEVEL) / len(plain))
            false = f"{wrong / len(plain):.2%} (1 % +- {error:.2%})"
            print(f"| `{kind}` | {' | '.join(shares)} | {false} | {seconds:.3f} |", flush=True)


if __name__ == "__main__":
    main()
