"""What it saves to read the head in part: tokens/s of whole texts, the making of the copy counted.

    python benchmarks/head_screen.py MODEL [--drafter plain blend] [--tokens 128] [--rounds 5]

Every round generates four texts with the head read whole, in part by the engine's own choice
(`auto`, with a fresh copy), and in part from the first pass on (`on`, the copy made before), in
turns in one process. Prints Markdown: medians over rounds, and ratios to the whole head.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import perf_counter

from paceline import LM
from paceline.engines.head_screen import HeadScreen

PROMPTS = (
    "The history of the Roman Empire begins",
    "def quicksort(values):",
    "The patient was admitted with fever and",
    "Once upon a time in a small village",
)
MODES = ("off", "auto", "on")


def seconds(lm: LM, mode: str, tokens: int, temperature: float) -> float:
    """Return the time of all texts in a mode; the copy of `on` is made before."""
    model = lm.engine._model
    if mode == "auto":
        model.drop_screen()
    lm.engine.head_screen = HeadScreen(model, mode)
    if mode == "on":
        model.make_screen()
    lm.reset()
    start = perf_counter()
    for seed, prompt in enumerate(PROMPTS):
        lm.generate(
            prompt, max_new_tokens=tokens, temperature=temperature, seed=seed, ignore_eos=True
        )
    return perf_counter() - start


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--drafter", nargs="+", default=["plain", "blend"])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=0.0)
    asked = parser.parse_args()
    print("| drafter | head | tokens/s | to the whole head | bytes read of the head |")
    print("|---|---|---:|---:|---:|")
    for drafter in asked.drafter:
        with LM(asked.model, drafter=drafter) as lm:
            seconds(lm, "off", min(asked.tokens, 16), asked.temperature)
            times: dict[str, list[float]] = {mode: [] for mode in MODES}
            shares: dict[str, float] = {}
            for _ in range(asked.rounds):
                for mode in MODES:
                    times[mode].append(seconds(lm, mode, asked.tokens, asked.temperature))
                    shares[mode] = lm.engine.head_screen.share or 1.0
            total = len(PROMPTS) * asked.tokens
            for mode in MODES:
                ratio = median(a / b for a, b in zip(times["off"], times[mode], strict=True))
                print(
                    f"| {drafter} | {mode} | {total / median(times[mode]):.1f} | {ratio:.2f}x | "
                    f"{shares[mode]:.0%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
