"""What a pass costs that computes the logits of some tokens only, as a Markdown table.

    python benchmarks/heads.py ../shared/models/tinystories-instruct-3m-chat

One thread. Arms take turns; cells are medians in microseconds. How many tokens per pass a draft
with so small a head still gains, `drafters.py MODEL --drafters model:path=DRAFT,head=N` says.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import perf_counter

import numpy as np

from paceline import LM
from paceline.core import TokenTree
from paceline.engines.view import View

SIZES = (0, 4096, 2048, 1024, 512)
TURNS, REPEATS = 60, 4


def microseconds(lm: LM, nodes: int, sizes: list[int]) -> dict[int, float]:
    """Size of the head (0: all tokens) -> time of a pass over a chain of `nodes`."""
    engine, random = lm.engine, np.random.default_rng(0)
    vocabulary = engine.config.vocab_size
    sequence = engine.start(random.integers(0, vocabulary, 32).astype(np.int32))
    tree = TokenTree.chain(random.integers(0, vocabulary, nodes))
    views: dict[int, View | None] = {0: None}
    for size in filter(None, sizes):
        views[size] = View(tokens=np.sort(random.permutation(vocabulary)[:size]).astype(np.int32))
    times: dict[int, list[float]] = {size: [] for size in views}
    for _ in range(TURNS):
        for size, view in views.items():
            engine.forward([(sequence, tree)], view=view)  # gathers the rows
            for _ in range(REPEATS):
                start = perf_counter()
                engine.forward([(sequence, tree)], view=view)
                times[size].append(perf_counter() - start)
    return {size: median(found) * 1e6 for size, found in times.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--formats", nargs="+", default=["fp32", "int8"])
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    options = parser.parse_args()
    titles = [
        str(size) if size else "all tokens" for size in {0: 0, **dict.fromkeys(options.sizes)}
    ]
    print("| format, nodes | " + " | ".join(titles) + " |")
    print("| --- |" + " --- |" * len(titles))
    for name in options.formats:
        lm = LM(options.model, drafter="plain", threads=1, dtype=name)
        for nodes in (1, 8):
            cells = microseconds(lm, nodes, options.sizes).values()
            print(f"| {name}, {nodes} | " + " | ".join(f"{cell:.0f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
