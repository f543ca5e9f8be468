r"""What is lost where changes of a tuned model are dropped: DARE and DAREx against the tuned model.

    python benchmarks/compression/tuned_changes.py MODEL TEXT \
        --recipe darex:drop=0.97,factor=dare --recipe darex:drop=0.97

The model learns the first 44 rows of 256 tokens of the text by `temp_lora`. Each recipe drops
changes of it; the result is judged on the next 24 rows, paired with the tuned model. The first
line is what the model before loses.
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
from paceline.measuring.quality import Scores, Windows, paired
from paceline.models import load

LENGTH, TEXTS, WINDOWS = 256, 44, 24
TUNE = "temp_lora"


def scores(path: Path, windows: Windows) -> Scores:
    """Return how a model predicts windows, on one thread."""
    with LM(path, drafter="plain", budget=1, threads=1) as lm:
        return windows.score(lm.engine)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--recipe", action="append", required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load(options.model)
    ids = model.tokenizer.encode(options.text.read_text(encoding="utf-8"))
    wanted = (TEXTS + WINDOWS) * LENGTH
    if len(ids) < wanted:
        parser.error(f"the text has {len(ids)} tokens, expected {wanted}")
    rows = np.asarray(ids[:wanted]).reshape(-1, LENGTH)
    texts = Calibration(rows[:TEXTS].astype(np.int64), options.text.name)
    windows = Windows(rows[TEXTS:].astype(np.int32), 1)
    print("| recipe | bytes | nats lost | standard error | same first choice | CPU seconds |")
    print("|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        tuned = Path(folder) / "tuned"
        CompressionJob(model, tuned, parse_recipe(TUNE)).run(texts)
        right = scores(tuned, windows)
        rest = paired(scores(options.model, windows), right)
        print(
            f"| the model before | 0 | {rest.nats:.4f} | {rest.error:.4f} | {rest.firsts:.3f} | |"
        )
        for place, recipe in enumerate(options.recipe):
            out, start = Path(folder) / str(place), time.process_time()
            steps = recipe.replace("darex:", f"darex:base={options.model.resolve()},")
            size = CompressionJob(load(tuned), out, parse_recipe(steps)).run(texts)
            spent = time.process_time() - start
            loss = paired(scores(out, windows), right)
            print(
                f"| `{recipe}` | {size.total} | {loss.nats:.4f} | {loss.error:.4f} | "
                f"{loss.firsts:.3f} | {spent:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
