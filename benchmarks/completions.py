"""How likely the continuations of `paceline complete` are, beside beam search, as a Markdown table.

    python benchmarks/completions.py ../shared/models/tinystories-instruct-3m-chat

Cells are means over prompts (see `drafters.py`) of the log chance, by the model, of the best
continuation and of all of them. N-grams are those of the prompt, and of what `paceline warm` kept.
"""

from __future__ import annotations

import argparse

import numpy as np

from drafters import prompts
from paceline import LM
from paceline.core import TokenTree
from paceline.decoding.superposed import superposed

ALPHAS = (0.0, 0.25, 0.5)


def beam(lm: LM, prompt: list[int], k: int, length: int) -> list[float]:
    """Scores of the k continuations that beam search finds, best first."""
    engine, found = lm.engine, [((), 0.0)]
    sequence = engine.start(np.array(prompt[:-1], np.int32))
    for _ in range(length):
        more = []
        for tokens, score in found:
            chain = TokenTree.chain(np.array([prompt[-1], *tokens], np.int32))
            row = engine.forward([(sequence, chain)])[-1].astype(np.float64)
            row -= row.max()
            row -= np.log(np.exp(row).sum())
            more += [((*tokens, int(t)), score + row[t]) for t in np.argsort(-row)[:k]]
        found = sorted(more, key=lambda one: -one[1])[:k]
    engine.release(sequence)
    return [score for _, score in found]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--count", type=int, default=25)
    parser.add_argument("-n", type=int, default=3)
    parser.add_argument("--length", type=int, default=10)
    options = parser.parse_args()
    lm = LM(options.model, drafter="plain")
    chosen, trace = prompts(lm, slice(options.count)), lm.target.trace
    known = {"the prompt": []}
    if trace:
        known["warm text, too"] = [trace.tokens[text] for text in trace.texts()]
    rows = {"beam search": [beam(lm, p, options.n, options.length) for p in chosen]}
    for alpha in ALPHAS:
        for name, texts in known.items():
            rows[f"superposed, alpha {alpha}, n-grams of {name}"] = [
                [
                    one.score
                    for one in superposed(
                        lm.engine,
                        np.array(prompt, np.int32),
                        options.n,
                        options.length,
                        alpha=alpha,
                        known=texts,
                    )
                ]
                for prompt in chosen
            ]
    print("| continuations | best | mean |\n| --- | --- | --- |")
    for name, scores in rows.items():
        best = np.mean([each[0] for each in scores])
        print(f"| {name} | {best:.1f} | {np.mean([np.mean(s) for s in scores]):.1f} |")


if __name__ == "__main__":
    main()
