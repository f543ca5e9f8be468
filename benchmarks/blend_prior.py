"""Fit the weights that `blend` starts with, and write native/drafting/blend_prior.hpp.

    python benchmarks/blend_prior.py MODEL --chat --limit 120 --record A.npz
    python benchmarks/blend_prior.py --recordings A.npz B.npz --header blend_prior.hpp

The first form answers prompts greedily and records the model's predictions at every position; the
second replays recordings of any models through `blend`, whose weights learn while its tables are
sometimes kept and sometimes forgotten, and averages the weights of the last rounds. In a replay a
rejected node teaches nothing, as its prediction was not recorded. The prompts are grade-school
mathematics (GSM8K), Python tasks (MBPP), questions on a given text (XQuAD), and Wikipedia articles
to summarise: none of them is in Spec-Bench, on which `benchmarks/drafters.py` judges the result.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from paceline import LM, _native
from paceline.core import Floats, Request, Step, Tokens, TokenTree
from paceline.drafters.base import Drafter, Target
from paceline.registry import drafters

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
K = 16  # predictions kept of each position
UNIT = 0.01  # of the numbers in the header
KINDS = 24  # of matches and recent positions
# Learning rate, nodes, and whether tables are kept from text to text.
ROUNDS = (
    (0.05, 1, False),
    (0.04, 16, True),
    (0.03, 8, False),
    (0.03, 16, True),
    (0.02, 4, False),
    (0.02, 12, True),
    (0.01, 8, False),
    (0.01, 16, True),
)
AVERAGED = 4  # last rounds


class Recording(NamedTuple):
    """Tokens [S] of a prompt and its answer, and the top K at each but the last [S - 1, K]."""

    prompt: int
    tokens: Tokens
    top_tokens: Tokens
    top_probs: Floats


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


def record(lm: LM, prompt: Any, new: int) -> Recording:
    """Answer greedily, then read the text again for the predictions."""
    request = lm.request(prompt, max_new_tokens=new, temperature=0.0)
    tokens = np.array([*request.prompt, *lm.stream(request).run().tokens], np.int32)
    sequence, rows = lm.engine.open(), []
    for start in range(0, len(tokens) - 1, 128):
        part = TokenTree.chain(tokens[start : start + 128][: len(tokens) - 1 - start])
        logits = lm.engine.forward([(sequence, part)])
        rows.append(_native.top_k(logits, min(K, logits.shape[1])))
        lm.engine.commit(sequence, np.arange(len(part), dtype=np.int32))
    lm.engine.release(sequence)
    top_tokens, top_probs = (np.concatenate(each) for each in zip(*rows, strict=True))
    return Recording(len(request.prompt), tokens, top_tokens, top_probs)


def replay(drafter: Drafter, text: Recording, budget: int) -> int:
    """Decode the recorded answer with a drafter; return the passes."""
    tokens, start = text.tokens, text.prompt
    drafter.begin(Request(prompt=tuple(tokens[:start].tolist()), max_new_tokens=len(tokens)))
    for at in range(0, start - 1, 128):
        part = tokens[at : min(at + 128, start - 1)]
        rows = slice(at, at + len(part))
        top = text.top_tokens[rows], text.top_probs[rows]
        path, drawn = np.arange(len(part), dtype=np.int32), tokens[at + 1 : at + 1 + len(part)]
        drafter.observe(Step(tokens[: at + 1], TokenTree.chain(part), *top, path, drawn))
    passes, length = 0, start
    while length < len(tokens):
        tree = drafter.propose(tokens[:length], budget).cut(len(tokens) - length - 1)
        path = [0]
        while True:
            child = tree.child(path[-1], int(tokens[length + len(path) - 1]))
            if child is None:
                break
            path.append(child)
        top_tokens = np.full((len(tree), text.top_tokens.shape[1]), -1, np.int32)
        top_probs = np.zeros(top_tokens.shape, np.float32)
        rows = slice(length - 1, length - 1 + len(path))
        top_tokens[path], top_probs[path] = text.top_tokens[rows], text.top_probs[rows]
        drawn = tokens[length : length + len(path)]
        accepted = np.array(path, np.int32)
        drafter.observe(Step(tokens[:length], tree, top_tokens, top_probs, accepted, drawn))
        length += len(path)
        passes += 1
    return passes


Weights = tuple[NDArray[np.float32], NDArray[np.float32]]


def weights_of(drafter: Any) -> Weights:
    """Return views of the weights and the biases of `blend`."""
    arrays = drafter._blend.mixer.arrays()
    return arrays["weights"], arrays["biases"]


def fit(groups: Sequence[Sequence[Recording]], vocabulary: int) -> Weights:
    """Run all rounds over all texts, in another order each.

    Args:
        groups: the texts of each model; only they share tables.
        vocabulary: every token is below it.
    """
    order, kept = np.random.default_rng(0), list[list[NDArray[np.float32]]]()
    for rate, budget, carried in ROUNDS:
        drafter = drafters.parse(f"blend:members=,rate={rate}").build(Target(vocabulary))
        if kept:
            _forget_tables(drafter, kept[-1])
        sums, passes = [np.zeros_like(array) for array in weights_of(drafter)], 0
        for group in groups:
            for number, i in enumerate(order.permutation(len(group))):
                if not (carried and number):
                    _forget_tables(drafter, [array.copy() for array in weights_of(drafter)])
                passes += replay(drafter, group[i], budget)
                for total, array in zip(sums, weights_of(drafter), strict=True):
                    total += array
        texts = [text for group in groups for text in group]
        kept.append([total / len(texts) for total in sums])
        answered = sum(len(text.tokens) - text.prompt for text in texts)
        how = "carried" if carried else "reset"
        print(f"rate {rate}, {budget} nodes, {how}: {answered / passes:.3f} tokens per pass")
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
    """Record answers, or fit to recordings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--chat", action="store_true", help="ask through the chat template")
    parser.add_argument("--limit", type=int, default=120, help="prompts")
    parser.add_argument("--longest", type=int, default=1500, help="most tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="most tokens of an answer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record", type=Path, help="file for the recording")
    parser.add_argument("--recordings", nargs="+", type=Path, default=[])
    parser.add_argument("--header", type=Path, help="write the weights there")
    options = parser.parse_args()
    groups: list[list[Recording]] = []
    if options.model:
        lm, texts = LM(options.model, drafter="blend", budget=8, threads=options.threads), []
        for text in islice(prompts(), options.limit):
            prompt = [{"role": "user", "content": text}] if options.chat else text
            request = lm.request(prompt, max_new_tokens=options.new)
            if len(request.prompt) + options.new <= min(options.longest, lm.engine.config.context):
                texts.append(record(lm, prompt, options.new))
        groups.append(texts)
        if options.record:
            np.savez_compressed(options.record, *(array for text in texts for array in text))
    for path in options.recordings:
        with np.load(path) as file:
            arrays = [file[f"arr_{i}"] for i in range(len(file.files))]
        groups.append([Recording(int(p), *a) for p, *a in zip(*[iter(arrays)] * 4, strict=True)])
    vocabulary = 1 + max(
        int(max(text.tokens.max(), text.top_tokens.max())) for group in groups for text in group
    )
    written = header(fit(groups, vocabulary))
    if options.header:
        options.header.write_text(written)


if __name__ == "__main__":
    main()
