"""How likely the continuations of `paceline complete` are, by method, as a Markdown table.

    python benchmarks/completions.py ../shared/models/tinystories-instruct-3m-chat

Cells are means over prompts (see `drafters.py`) of the log-probability, by the model, of the best
continuation and of all of them; medians of the time, methods in turns. N-grams are those of the
prompt, and of what `paceline warm` kept.
"""

from __future__ import annotations

import argparse
from time import perf_counter

import numpy as np

from drafters import prompts
from paceline import LM
from paceline.core import Request
from paceline.decoding.strategies.base import Task
from paceline.decoding.strategies.beam import Beam
from paceline.decoding.strategies.superposed import Superposed

ALPHAS = (0.0, 0.25, 0.5)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--count", type=int, default=25)
    parser.add_argument("-n", type=int, default=3)
    parser.add_argument("--length", type=int, default=10)
    options = parser.parse_args()
    lm = LM(options.model, drafter="plain")
    chosen, trace = prompts(lm, slice(options.count)), lm.draft_target.trace
    known = {"the prompt": []}
    if trace:
        known["warm text, too"] = [trace.tokens[text] for text in trace.texts()]
    n = options.n
    arms = {"beam search": (Beam(n, n, length_penalty=0.0), [])}
    for alpha in ALPHAS:
        for name, texts in known.items() if alpha else [("nothing", [])]:
            arms[f"superposed, alpha {alpha}, n-grams of {name}"] = (
                Superposed(n, n, alpha),
                texts,
            )
    scores = {name: [] for name in arms}
    seconds = {name: [] for name in arms}
    for prompt in chosen:
        for name, (strategy, texts) in arms.items():
            request, start = Request(tuple(prompt), options.length), perf_counter()
            found = strategy.run(Task(lm.engine, request, known_texts=lambda texts=texts: texts))
            seconds[name].append(perf_counter() - start)
            scores[name].append([one.score for one in found])
    print("| continuations | best | mean | ms |\n| --- | --- | --- | --- |")
    for name, each in scores.items():
        best, mean = np.mean([s[0] for s in each]), np.mean([np.mean(s) for s in each])
        print(f"| {name} | {best:.1f} | {mean:.1f} | {np.median(seconds[name]) * 1e3:.0f} |")


if __name__ == "__main__":
    main()
