"""Plain decoding against `--budget auto`, whole outputs, on one model; the arms take turns.

    python benchmarks/end_to_end.py MODEL [--format int8] [--threads 2] [--count 40] [--random]

Prompts are the first 64 tokens of documents of stories-val, as in `drafters.py`; `--random` takes
random tokens instead. 100 new tokens, greedy, past the model's own end. The drafter keeps what it
learns from prompt to prompt. Give it an inflated model (`paceline inflate`) to see real acceptance
at a real size.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

import numpy as np

from drafters import NEW, PROMPT, prompts
from paceline import LM
from paceline.core import Output
from paceline.decoding.governor import Budget, Fixed, Governor
from paceline.measuring.costfile import known_cost
from paceline.measuring.statistics import median_interval


def answer(lm: LM, prompt: list[int], budget: Budget) -> Output:
    """One output."""
    lm.budget = budget
    request = lm.request(prompt, max_new_tokens=NEW, temperature=0.0, ignore_eos=True)
    return lm.stream(request).run()


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--format", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--random", action="store_true")
    options = parser.parse_args()
    lm = LM(options.model, format=options.format, threads=options.threads)
    governor = Governor(known_cost(lm.engine))
    chosen = prompts(lm, slice(0, options.count))
    if options.random:
        draws = np.random.default_rng(0).integers(3, len(lm.tokenizer), (options.count, PROMPT))
        chosen = draws.tolist()
    plain: list[Output] = []
    drafted: list[Output] = []
    for turn, prompt in enumerate(chosen):
        arms: list[tuple[Budget, list[Output]]] = [(Fixed(0), plain), (governor, drafted)]
        for budget, outputs in arms if turn % 2 else arms[::-1]:
            outputs.append(answer(lm, prompt, budget))
        if plain[-1].tokens != drafted[-1].tokens:
            raise SystemExit(f"prompt {turn}: the outputs differ; this is a bug")
    times = [(p.seconds.decode, d.seconds.decode) for p, d in zip(plain, drafted, strict=True)]
    ratio = median_interval([p / d for p, d in times])
    slowest, fastest = min(p / d for p, d in times), max(p / d for p, d in times)
    passes = sum(output.passes for output in drafted)
    print(f"{options.model.name}, {lm.engine.format}, {len(chosen)} prompts, outputs identical")
    print(f"plain: median {median(NEW / p for p, _ in times):.1f} tokens/s")
    print(f"auto: {NEW * len(chosen) / passes:.2f} tokens per pass")
    print(f"ratio: {ratio}; slowest prompt {slowest:.2f}, fastest {fastest:.2f}")
    print(f"total time: {sum(p for p, _ in times) / sum(d for _, d in times):.2f}x faster")
    print(governor.report())


if __name__ == "__main__":
    main()
