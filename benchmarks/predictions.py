"""Tokens per pass of `predicted_output` when some predicted tokens are wrong, in Markdown.

    python benchmarks/predictions.py ../shared/models/bitstories-3M

The prediction is plain decoding's own output, edited: each token is left out, replaced, or preceded
by another one, with the same probability (seed 0). Prompts and lengths are those of `drafters.py`;
learned probabilities are carried from prompt to prompt. Outputs are compared with plain decoding's.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from drafters import NEW, prompts
from paceline import LM

EDITS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)


def edited(tokens: list[int], share: float, vocabulary: int, rng: random.Random) -> list[int]:
    """`tokens` with about `share` of them left out, replaced or preceded by a random one."""
    out: list[int] = []
    for token in tokens:
        if rng.random() >= share:
            out.append(token)
            continue
        edit = rng.choice(("leave out", "replace", "insert"))
        if edit != "leave out":
            out.append(rng.randrange(vocabulary))
        if edit == "insert":
            out.append(token)
    return out


def main() -> None:
    """Print one table for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--budgets", nargs="+", type=int, default=[8, 16, 32])
    options = parser.parse_args()
    for model in options.models:
        lm = LM(model, drafter="plain", budget=0, threads=1)
        chosen = prompts(lm, slice(0, options.prompts))
        asked = {"max_new_tokens": NEW, "temperature": 0.0, "ignore_eos": True}
        plain = [lm.generate(prompt, **asked).tokens for prompt in chosen]
        print(f"**{model.name}, {len(chosen)} prompts**\n")
        print("| tokens edited | " + " | ".join(f"{b} nodes" for b in options.budgets) + " |")
        print("| --- " * (len(options.budgets) + 1) + "|")
        for share in EDITS:
            cells = []
            for budget in options.budgets:
                lm = LM(model, drafter="predicted_output", budget=budget, threads=1)
                rng, passes = random.Random(0), 0
                for prompt, tokens in zip(chosen, plain, strict=True):
                    expected = edited(tokens, share, lm.draft_target.vocab_size, rng)
                    output = lm.generate(prompt, prediction=expected, **asked)
                    if output.tokens != tokens:
                        raise SystemExit("an output differs from plain decoding's")
                    passes += output.passes
                cells.append(f"{NEW * len(chosen) / passes:.2f}")
            print(f"| {share:.0%} | " + " | ".join(cells) + " |", flush=True)
        print()


if __name__ == "__main__":
    main()
