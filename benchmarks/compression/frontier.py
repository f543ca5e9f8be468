r"""Bits against loss: recipes on shuffled bases, paired with the base, as Markdown.

    python benchmarks/compression/frontier.py BASE [BASE ...] --recipe rtn:bits=4,group=32 \
        --recipe awq+gptq:bits=4,group=32 [--windows 20] [--cache FILE] [--calibration FILE]

BASE is a folder that `base.py` wrote; several seeds are averaged. The text is WikiText-2's
validation part in windows of 512 tokens, documents with `<unk>` left out sentence by sentence.
Results are kept in the cache file by base, recipe and settings, and beside it how each base
predicts the text and what it wrote for calibration. `--calibration wikipedia` takes the first
articles of the shared ones, which are others than those of WikiText. `--folder FOLDER` judges what
`paceline compress BASE FOLDER` wrote.

`--speed` adds tokens a second of passes over one token behind 128 others, in the native engine,
with embedding and head in 8 bits; what the cache knows without a speed is made again. `plot.py`
draws what the cache holds.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np

from paceline.cli.compress import own_writer
from paceline.compress.base import Statistics
from paceline.compress.calibrate import Calibration, calibration
from paceline.compress.checkpoint import stored_size
from paceline.compress.job import CompressionJob
from paceline.compress.recipe import Recipe, parse_recipe
from paceline.core import Floats
from paceline.engines.cost import measure_cost
from paceline.engines.native import NativeEngine
from paceline.lm import LM
from paceline.measuring.quality import WINDOW, Loss, Scores, paired, text_windows
from paceline.models import Model, load
from paceline.models.tensors import Linear

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
WIKITEXT = DATA / "wikitext-2" / "valid.tokens.txt.gz"
WIKIPEDIA = DATA.parent / "text" / "wikipedia-en.jsonl.xz"

COLUMNS = ("bits", "bytes", "nats", "error", "firsts")
SPEED = "tokens_per_second"
HEAD = "rtn:bits=8,group=32"  # of embedding and head, while speed is measured


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


def wikipedia(characters: int = 224_000) -> str:
    """Return the beginning of the shared Wikipedia articles."""
    articles: list[str] = []
    with lzma.open(WIKIPEDIA, "rt", encoding="utf-8") as lines:
        while sum(map(len, articles)) < characters:
            articles.append(json.loads(next(lines))["text"])
    return "\n\n".join(articles)[:characters]


def score(path: Path, windows: int) -> Scores:
    """Return how a model predicts the text, in the formats that it is stored in."""
    lm = LM(path, drafter="plain", budget=1)
    size = min(WINDOW, lm.model.config.context)
    return text_windows(lm.tokenizer, wikitext(), size, windows).score(lm.engine)


class ByteHead(Mapping[str, Linear | Floats]):
    """The weights of a model with embedding and head in 8 bits, the rest as it is stored.

    Left at float32, as losses are measured, they would take most of the time of small models.
    """

    def __init__(self, weights: Mapping[str, Linear | Floats]) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> Linear | Floats:
        weight = self._weights[name]
        if name not in ("embed", "head"):
            return weight
        import torch

        dense = weight.dense() if isinstance(weight, Linear) else np.asarray(weight, np.float32)
        values = torch.from_numpy(np.array(dense))
        return parse_recipe(HEAD, HEAD).head.compress(values, Statistics())

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def speed(path: Path, repeats: int = 15) -> float:
    """Return passes a second over one token behind 128 others, the median of all repeats."""
    model = load(path)
    engine = NativeEngine(model.config, ByteHead(model.weights))
    return 1 / measure_cost(engine, sizes=(1,), repeats=repeats).seconds[0]


def kept_arrays(
    cache: Path | None, name: str, make: Callable[[], Mapping[str, np.ndarray]]
) -> Mapping[str, np.ndarray]:
    """Return arrays from a file beside the cache, or make them and keep them there."""
    path = None if cache is None else cache.with_name(f"{cache.stem}-{name}.npz")
    if path is not None and path.exists():
        with np.load(path) as found:
            return dict(found)
    made = make()
    if path is not None:
        np.savez(path, **made)
    return made


def score_base(base: Path, windows: int, cache: Path | None) -> Scores:
    """Return how a base predicts the text."""

    def make() -> Mapping[str, np.ndarray]:
        found = score(base, windows)
        return {"nats": found.nats, "firsts": found.firsts, "bits": np.array(found.bits_per_byte)}

    kept = kept_arrays(cache, f"{base.name}-{windows}", make)
    return Scores(kept["nats"], kept["firsts"], float(kept["bits"]))


def calibration_texts(base: Path, model: Model, recipe: Recipe, asked: Any) -> Calibration:
    """Return what `paceline compress` calibrates on; of recipes without data a short text."""
    if not recipe.needs_data:
        return calibration(model, count=1, length=64)
    write, seed = own_writer(model, asked.seed), asked.seed

    def own(tokens: int) -> np.ndarray:
        name = f"{base.name}-own-{tokens}-{seed}"
        return kept_arrays(asked.cache, name, lambda: {"tokens": write(tokens)})["tokens"]

    if asked.calibration != "wikipedia":
        return calibration(model, asked.calibration, asked.rows, asked.length, seed, own)
    with tempfile.TemporaryDirectory() as folder:
        articles = Path(folder) / "wikipedia.txt"
        articles.write_text(wikipedia(), encoding="utf-8")
        return calibration(model, str(articles), asked.rows, asked.length, seed)


def judge(base: Path, recipe: str, asked: SimpleNamespace) -> dict[str, Any]:
    """Return bits, loss and seconds of a recipe on a base."""
    whole = score_base(base, asked.windows, asked.cache)
    with tempfile.TemporaryDirectory() as folder:
        out, plan, model = Path(folder) / "out", parse_recipe(recipe), load(base)
        start = perf_counter()
        size = CompressionJob(model, out, plan).run(calibration_texts(base, model, plan, asked))
        seconds = perf_counter() - start
        loss = paired(score(out, asked.windows), whole)
        fast = speed(out) if asked.speed else None
        if asked.keep:
            shutil.copytree(out, Path(asked.keep) / f"{base.name}-{_slug(recipe)}")
    return row(size.bits_per_weight, size.total, loss, fast) | {"seconds": seconds}


def judge_folder(base: Path, folder: Path, asked: SimpleNamespace) -> dict[str, Any]:
    """Return bits and loss of a compressed model that is there."""
    size = stored_size(load(folder))
    loss = paired(score(folder, asked.windows), score_base(base, asked.windows, asked.cache))
    fast = speed(folder) if asked.speed else None
    return row(size.bits_per_weight, size.total, loss, fast)


def row(bits: float, total: int, loss: Loss, fast: float | None) -> dict[str, Any]:
    """Return what is kept and shown of one compressed model."""
    found = {"bits": bits, "bytes": total}
    found |= {"nats": loss.nats, "error": loss.error, "firsts": loss.firsts}
    return found if fast is None else found | {SPEED: fast}


def is_known(known: Mapping[str, Any], key: str, asked: SimpleNamespace) -> bool:
    """Return whether the cache has all that is asked for of a result."""
    return key in known and (not asked.speed or SPEED in known[key])


def key_of(base: Path, recipe: str, asked: SimpleNamespace) -> str:
    """Return the key of a result in the cache."""
    settings = [asked.windows, asked.calibration, asked.rows, asked.length, asked.seed]
    return json.dumps([str(base), recipe, *settings])


def print_table(results: Mapping[str, Sequence[Mapping[str, float]]], title: bool = True) -> None:
    """Print means over the bases as rows of a table."""
    if title:
        print("| recipe | bits | MB | nats | error | first choices | tokens/s |")
        print("|---|---:|---:|---:|---:|---:|---:|")
    for recipe, rows in results.items():
        mean = {name: float(np.mean([each[name] for each in rows])) for name in COLUMNS}
        speeds = [each[SPEED] for each in rows if SPEED in each]
        fast = f"{np.mean(speeds):.0f}" if speeds else ""
        print(
            f"| `{recipe}` | {mean['bits']:.2f} | {mean['bytes'] / 1e6:.1f} | {mean['nats']:.4f} | "
            f"{mean['error']:.4f} | {mean['firsts']:.3f} | {fast} |",
            flush=True,
        )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the options that results depend on, and where they are kept."""
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--calibration", default="mixed")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speed", action="store_true", help="measure tokens/s, too")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--keep", help="folder for the compressed models")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower())


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bases", nargs="+", type=Path)
    parser.add_argument("--recipe", action="append", default=[])
    parser.add_argument("--folder", type=Path, help="of a compressed model, made from the one base")
    add_settings(parser)
    asked: SimpleNamespace = parser.parse_args(namespace=SimpleNamespace())
    if asked.folder:
        title = str(asked.folder.name)
        print_table({title: [judge_folder(asked.bases[0], asked.folder, asked)]})
    known = json.loads(asked.cache.read_text()) if asked.cache and asked.cache.exists() else {}
    for number, recipe in enumerate(asked.recipe):
        rows = []
        for base in asked.bases:
            key = key_of(base, recipe, asked)
            if not is_known(known, key, asked):
                known[key] = judge(base, recipe, asked)
                if asked.cache:
                    asked.cache.write_text(json.dumps(known, indent=1))
            rows.append(known[key])
        print_table({recipe: rows}, title=number == 0 and not asked.folder)


if __name__ == "__main__":
    main()
