"""Fit the weights that `blend` starts with, and write native/drafting/blend_prior.hpp.

    python benchmarks/blend_prior.py MODEL... --limit 48 --header blend_prior.hpp

Every model answers prompts greedily with `blend`, whose weights learn while its tables are at times
kept and at times forgotten; the means of the last rounds are written. `--chat` asks through the
models' chat templates. The prompts are grade-school mathematics (GSM8K), Python tasks (MBPP),
questions on a given text (XQuAD), and Wikipedia articles to summarise: none of them is in
Spec-Bench, on which `benchmarks/drafters.py` judges the result.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline import LM
from paceline.core import Request
from paceline.decoding.governor import Fixed
from paceline.decoding.loop import Generation
from paceline.drafters.base import Drafter, Target
from paceline.registry import drafters

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
UNIT = 0.01  # of the numbers in the header
KINDS = 24  # of matches and recent positions
# Learning rate, nodes, and whether tables are kept from text to text.
ROUNDS = (
    (0.05, 8, False),
    (0.04, 16, True),
    (0.03, 12, False),
    (0.02, 16, True),
    (0.02, 8, False),
    (0.01, 8, True),
    (0.01, 16, False),
)
AVERAGED = 3  # last rounds


def prompts() -> Iterator[str]:
    """Mix the prompts of all kinds."""
    with gzip.open(SHARED / "data/gsm8k/train.jsonl.gz", "rt") as lines:
        sums = [json.loads(line)["question"] for line in lines]
    mbpp = (SHARED / "data/mbpp/mbpp.jsonl").read_text().splitlines()
    tasks = [json.loads(line)["text"] for line in mbpp]
    [squad] = (SHARED / "data/xquad-en").glob("*.json*")
    text = squad.read_bytes()
    articles = json.loads(gzip.decompress(text) if squad.suffix == ".gz" else text)["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    with lzma.open(SHARED / "text/wikipedia-en.jsonl.xz", "rt") as lines:
        articles = [json.loads(line)["text"] for line in islice(lines, len(paragraphs))]
    for i, (paragraph, article) in enumerate(zip(paragraphs, articles, strict=True)):
        question = paragraph["qas"][0]["question"]
        yield sums[i]
        yield tasks[i]
        yield f"Answer the question using the text.\n\nText: {paragraph['context']}\n\n{question}"
        yield f"Summarize: {article[:1200]}"
        yield f"Tell me about {article[:40].split('(')[0].splitlines()[0].strip()}."
        yield paragraph["qas"][-1]["question"]


Weights = tuple[NDArray[np.float32], NDArray[np.float32]]


def weights_of(drafter: Any) -> Weights:
    """Return views of the weights and the biases of `blend`."""
    arrays = drafter._blend.mixer.arrays()
    return arrays["weights"], arrays["biases"]


def fit(models: Sequence[LM], requests: Sequence[Sequence[Request]]) -> Weights:
    """Run all rounds over all requests, each model's in another order each time."""
    order, kept = np.random.default_rng(0), list[list[NDArray[np.float32]]]()
    vocabulary = max(lm.engine.config.vocab_size for lm in models)
    for rate, budget, carried in ROUNDS:
        drafter = drafters.parse(f"blend:members=,rate={rate}").build(Target(vocabulary))
        if kept:
            _forget_tables(drafter, kept[-1])
        sums, count, rates = [np.zeros_like(array) for array in weights_of(drafter)], 0, []
        for lm, asked in zip(models, requests, strict=True):
            tokens = passes = 0
            for number, i in enumerate(order.permutation(len(asked))):
                if not (carried and number):
                    _forget_tables(drafter, [array.copy() for array in weights_of(drafter)])
                output = Generation(lm.engine, drafter, asked[i], Fixed(budget)).run()
                tokens, passes, count = (
                    tokens + len(output.tokens),
                    passes + output.passes,
                    count + 1,
                )
                for total, array in zip(sums, weights_of(drafter), strict=True):
                    total += array
            rates.append(f"{tokens / passes:.3f}")
        kept.append([total / count for total in sums])
        how = "carried" if carried else "reset"
        print(f"rate {rate}, {budget} nodes, {how}: {', '.join(rates)} tokens per pass")
    last = [np.mean(each, axis=0) for each in zip(*kept[-AVERAGED:], strict=True)]
    return last[0], last[1]


def _forget_tables(drafter: Drafter, weights: Sequence[NDArray[np.float32]]) -> None:
    drafter.reset()
    for array, values in zip(weights_of(drafter), weights, strict=True):
        array[:] = values


def header(weights: Weights) -> str:
    """Write the weights as C++."""
    flat, biases = weights
    sets, contexts = len(biases), len(biases) - 1
    ours = sets * contexts * 8
    parts = {"kBiases": biases, "kContexts": flat[:ours], "kKinds": flat[ours:]}
    assert len(flat) == ours + sets * KINDS * 2
    lines = [
        "// The weights that a blend starts with. Written by benchmarks/blend_prior.py.",
        "",
        "#pragma once",
        "",
        "#include <cstddef>",
        "#include <cstdint>",
        "",
        "namespace paceline::prior {",
        "",
        "// Of the mixer that they are for; in units of `kUnit`.",
        f"constexpr size_t kOrders = {contexts - 2}, kSkips = 1;",
        f"constexpr float kUnit = {UNIT}f;",
        "",
    ]
    shapes = {"kBiases": "[sets]", "kContexts": "[sets, contexts, 4, 2]", "kKinds": "[sets, 24, 2]"}
    for name, values in parts.items():
        lines += [f"// {shapes[name]}", f"constexpr int16_t {name}[] = {{"]
        numbers = [str(round(float(value) / UNIT)) for value in values]
        row = "   "
        for number in numbers:
            if len(row) + len(number) + 2 > 100:
                lines.append(row)
                row = "   "
            row += f" {number},"
        lines += [row, "};", ""]
    return "\n".join([*lines, "}  // namespace paceline::prior", ""])


def main() -> None:
    """Fit to the models' answers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--chat", action="store_true", help="ask through the chat template")
    parser.add_argument("--limit", type=int, default=48, help="prompts of each model")
    parser.add_argument("--longest", type=int, default=1500, help="most tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="most tokens of an answer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--header", type=Path, help="write the weights there")
    options = parser.parse_args()
    models = [LM(m, drafter="plain", budget=0, threads=options.threads) for m in options.models]
    requests = []
    for lm in models:
        room = min(options.longest, lm.engine.config.context - options.new)
        asked = []
        for text in islice(prompts(), options.limit):
            prompt = [{"role": "user", "content": text}] if options.chat else text
            one = lm.request(prompt, max_new_tokens=options.new, temperature=0.0)
            if len(one.prompt) <= room:
                asked.append(one)
        requests.append(asked)
    written = header(fit(models, requests))
    if options.header:
        options.header.write_text(written)


if __name__ == "__main__":
    main()
