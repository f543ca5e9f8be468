"""Required keywords: are they there, how natural is the text, and what does it cost?

    paceline distil-hmm ../shared/models/stories260K build/hmm --states 128
    python benchmarks/keywords.py ../shared/models/stories260K build/hmm [--outputs 200]

Each output is to have three words that a story of `stories-val` has, drawn at random from those
of four letters or more, within 64 new tokens, at temperature 1, without stop tokens before they
are there. `nats`: what a token of the output costs under the model alone, without any control: the
lower the more the model could have said it by itself. `place`: share of the output that was written
when the last keyword was complete. Those two are the same on any machine; times are not.
"""

from __future__ import annotations

import argparse
import gzip
import re
from pathlib import Path
from time import perf_counter

import numpy as np

from paceline import LM
from paceline.control.keywords import Keywords
from paceline.core import Output, Request, TokenTree

SHARED = Path(__file__).resolve().parents[2] / "shared"
STORIES = SHARED / "data" / "stories-val"
PROMPT = "Once upon a time there was"
NEW = 64
_WORD = re.compile(r"\b[a-z]{4,}\b")


def wanted(count: int, words: int) -> list[list[str]]:
    """Return sets of words, each of one document."""
    text = "".join(gzip.decompress(path.read_bytes()).decode() for path in STORIES.glob("*.gz"))
    documents = [part for part in text.split("<|endoftext|>") if "Story:" in part]
    generator = np.random.default_rng(0)
    found = []
    while len(found) < count:
        story = documents[generator.integers(len(documents))].partition("Story:")[2]
        known = sorted(set(_WORD.findall(story)))
        if len(known) >= 10:
            found.append(generator.choice(known, words, replace=False).tolist())
    return found


def nats(lm: LM, request: Request, output: Output) -> float:
    """Mean of -log p(token) in the output, by the model alone."""
    tokens = np.array([*request.prompt, *output.tokens], np.int32)
    sequence = lm.engine.open()
    logits = lm.engine.forward([(sequence, TokenTree.chain(tokens))]).astype(np.float64)
    lm.engine.release(sequence)
    first = len(request.prompt) - 1
    logits = logits[first:-1] - logits[first:-1].max(1, keepdims=True)
    probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return float(-probs[np.arange(len(probs)), tokens[first + 1 :]].mean())


def place(text: str, words: list[str]) -> float | None:
    """Where the last keyword ends; None where one is missing."""
    found = [re.search(rf"\b[{w[0]}{w[0].upper()}]{w[1:]}\b", text) for w in words]
    if not all(found):
        return None
    return max(match.end() for match in found if match) / len(text)


def main() -> None:
    """All outputs in each of three ways, in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("hmm")
    parser.add_argument("--outputs", type=int, default=200)
    parser.add_argument("--words", type=int, default=3)
    parser.add_argument("--drafter", default="plain")
    given = parser.parse_args()

    lm = LM(given.model, drafter=given.drafter, budget=0 if given.drafter == "plain" else 16)
    ways = ("no control", "keywords", "keywords with an HMM")
    places: dict[str, list[float | None]] = {way: [] for way in ways}
    costs: dict[str, list[float]] = {way: [] for way in ways}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    bound: dict[str, list[float]] = {way: [] for way in ways}
    sets = wanted(given.outputs, given.words)
    for seed, words in enumerate(sets):
        for way in ways:
            control = Keywords.of(words, hmm=given.hmm if way == ways[2] else "")
            start = perf_counter()
            request = lm.request(
                PROMPT,
                max_new_tokens=NEW,
                temperature=1.0,
                seed=seed,
                controls={},
                keywords=None if way == ways[0] else control,
            )
            bound[way].append(perf_counter() - start)
            output = lm.stream(request).run()
            seconds[way].append(output.seconds.decode / len(output.tokens))
            places[way].append(place(output.text, words))
            costs[way].append(nats(lm, request, output))
            if seed < 3:
                print(f"<!-- {way}, {', '.join(words)}: {output.text!r} -->")
    print(f"\n{len(sets)} outputs, {given.words} keywords each, {Path(given.model).name}\n")
    print("| | with all keywords | place | nats a token | ms to begin | ms a token |")
    print("|---|---|---|---|---|---|")
    for way in ways:
        there = [at for at in places[way] if at is not None]
        print(
            f"| {way} | {len(there)} of {len(sets)} | {np.mean(there) if there else 0:.2f} "
            f"| {np.mean(costs[way]):.2f} | {np.median(bound[way]) * 1e3:.1f} "
            f"| {np.median(seconds[way]) * 1e3:.2f} |"
        )


if __name__ == "__main__":
    main()
