r"""Bits against loss: recipes on shuffled bases, paired with the base, as Markdown.

    python benchmarks/compression/frontier.py BASE [BASE ...] --recipe rtn:bits=4,group=32 \
        --recipe awq+gptq:bits=4,group=32 [--windows 20] [--cache FILE] [--calibration FILE]

BASE is a folder that `base.py` wrote; several seeds are averaged. The text is WikiText-2's
validation part in windows of 512 tokens, documents with `<unk>` left out sentence by sentence.
Results are kept in the cache file by base, recipe and settings.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from paceline.compress.calibrate import calibration
from paceline.compress.job import CompressionJob
from paceline.compress.recipe import parse_recipe
from paceline.lm import LM
from paceline.measuring.quality import WINDOW, Loss, Scores, paired, text_windows
from paceline.models import load

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
WIKITEXT = DATA / "wikitext-2" / "valid.tokens.txt.gz"


def wikitext() -> str:
    """Return WikiText's validation part as plain text, without sentences that hold `<unk>`."""
    lines = gzip.decompress(WIKITEXT.read_bytes()).decode().split("\n")
    kept = []
    for line in lines:
        text = line.strip()
        if not text or text.startswith("="):
            continue
        sentences = [part for part in text.split(" . ") if "<unk>" not in part]
        text = ". ".join(sentences)
        text = re.sub(r" @(.)@ ", r"\1", text)
        text = re.sub(r" ([,.;:!?)'%])", r"\1", text).replace("( ", "(")
        if len(text) > 60:
            kept.append(text)
    return "\n\n".join(kept)


def score(path: Path, windows: int) -> Scores:
    """Return how a model predicts the text, in the formats that it is stored in."""
    lm = LM(path, drafter="plain", budget=1)
    size = min(WINDOW, lm.model.config.context)
    return text_windows(lm.tokenizer, wikitext(), size, windows).score(lm.engine)


def judge(base: Path, recipe: str, asked: SimpleNamespace) -> dict[str, Any]:
    """Return bits, loss and seconds of a recipe on a base."""
    whole = score(base, asked.windows)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        model = load(base)
        job = CompressionJob(model, out, parse_recipe(recipe))
        texts = calibration(model, asked.calibration, asked.rows, asked.length, asked.seed)
        size = job.run(texts)
        loss = paired(score(out, asked.windows), whole)
        if asked.keep:
            shutil.copytree(out, Path(asked.keep) / f"{base.name}-{_slug(recipe)}")
    return row(size.bits_per_weight, size.total, loss)


def row(bits: float, total: int, loss: Loss) -> dict[str, Any]:
    """Return what is kept and shown of one compressed model."""
    sizes = {"bits": bits, "bytes": total}
    return sizes | {"nats": loss.nats, "error": loss.error, "firsts": loss.firsts}


def key_of(base: Path, recipe: str, asked: SimpleNamespace) -> str:
    """Return the key of a result in the cache."""
    settings = [asked.windows, asked.calibration, asked.rows, asked.length, asked.seed]
    return json.dumps([str(base), recipe, *settings])


def print_table(results: Mapping[str, Sequence[Mapping[str, float]]], title: bool = True) -> None:
    """Print means over the bases as rows of a table."""
    if title:
        print("| recipe | bits | MB | nats | error | first choices |")
        print("|---|---:|---:|---:|---:|---:|")
    for recipe, rows in results.items():
        mean = {name: float(np.mean([each[name] for each in rows])) for name in rows[0]}
        print(
            f"| `{recipe}` | {mean['bits']:.2f} | {mean['bytes'] / 1e6:.1f} | {mean['nats']:.4f} | "
            f"{mean['error']:.4f} | {mean['firsts']:.3f} |",
            flush=True,
        )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the options that results depend on, and where they are kept."""
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--calibration", default="mixed")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--keep", help="folder for the compressed models")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower())


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bases", nargs="+", type=Path)
    parser.add_argument("--recipe", action="append", required=True)
    add_settings(parser)
    asked: SimpleNamespace = parser.parse_args(namespace=SimpleNamespace())
    known = json.loads(asked.cache.read_text()) if asked.cache and asked.cache.exists() else {}
    for number, recipe in enumerate(asked.recipe):
        rows = []
        for base in asked.bases:
            key = key_of(base, recipe, asked)
            if key not in known:
                known[key] = judge(base, recipe, asked)
                if asked.cache:
                    asked.cache.write_text(json.dumps(known, indent=1))
            rows.append(known[key])
        print_table({recipe: rows}, title=number == 0)


if __name__ == "__main__":
    main()
