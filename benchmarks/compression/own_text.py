r"""What recipes lose on a model's own text: for models too small for any other text.

    python benchmarks/compression/own_text.py MODEL --recipe flap --recipe narrow

The model writes 28,000 tokens at temperature 1. Recipes are calibrated on the first 64 texts of
256, and judged on the next 40, paired with the model, in nats a token.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from paceline.compress.calibrate import Calibration
from paceline.compress.job import CompressionJob
from paceline.compress.recipe import parse_recipe
from paceline.lm import LM
from paceline.measuring.quality import Windows, paired
from paceline.training.self_text import selftext

LENGTH, TEXTS, WINDOWS, WRITTEN = 256, 64, 40, 28_000


def opened(path: Path) -> LM:
    """Return a model that decodes plainly on one thread."""
    return LM(path, drafter="plain", budget=1, threads=1)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--recipe", action="append", required=True)
    parser.add_argument("--seed", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lm = opened(options.model)
    opening, stops = lm.tokenizer.encode("")[:1], lm.model.defaults.stop_tokens
    written = selftext(lm.engine, WRITTEN, opening, stops, temperature=1.0, seed=options.seed)
    rows = np.asarray(written.tokens[: (TEXTS + WINDOWS) * LENGTH]).reshape(-1, LENGTH)
    texts = Calibration(rows[:TEXTS].astype(np.int64), "the model's own texts")
    windows = Windows(rows[TEXTS:].astype(np.int32), 1)
    base = windows.score(lm.engine)
    print("| recipe | bytes | nats lost | standard error | same first choice | CPU seconds |")
    print("|---|---:|---:|---:|---:|---:|")
    for recipe in options.recipe:
        with tempfile.TemporaryDirectory() as folder:
            out, start = Path(folder) / "out", time.process_time()
            size = CompressionJob(lm.model, out, parse_recipe(recipe)).run(texts)
            spent = time.process_time() - start
            with opened(out) as compressed:
                loss = paired(windows.score(compressed.engine), base)
        print(
            f"| `{recipe}` | {size.total} | {loss.nats:.4f} | {loss.error:.4f} | "
            f"{loss.firsts:.3f} | {spent:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
