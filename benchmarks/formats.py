"""What each format of the weights costs in quality: bits per byte and first choices, as Markdown.

    python benchmarks/formats.py ../shared/models/bitstories-3M [MODEL ...] [--documents 200] [--kv]

With `--kv` the formats are those of cached keys and values; the weights stay in fp32.

Texts: the stories of stories-val, and WikiText-2's validation part. The models at hand are trained
on stories; their WikiText numbers are high and only their ratios mean something.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np

from paceline.engines.formats import NotTernaryError
from paceline.engines.native import FORMATS, KV_FORMATS, NativeEngine
from paceline.measuring.perplexity import predict
from paceline.models import Model, load

HEADS = ("int4:head=int4", "int4:head=fp16", "ternary:head=fp32")  # besides each format's own
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
STORIES = DATA / "stories-val" / "soda-tinystories-instruct_val.txt.gz"
WIKITEXT = DATA / "wikitext-2" / "valid.tokens.txt.gz"


def documents(count: int) -> dict[str, list[str]]:
    """Name of a source -> its first documents."""
    chats = gzip.decompress(STORIES.read_bytes()).decode().split("<|endoftext|>")
    stories = [text.partition("Story:")[2] for text in chats]
    wiki = gzip.decompress(WIKITEXT.read_bytes()).decode().split("\n")
    return {
        "stories-val": [text.strip() for text in stories if text.strip()][:count],
        "wikitext-2": [text.strip() for text in wiki if len(text) > 200][:count],
    }


def agreement(model: Model, engine: NativeEngine, exact: NativeEngine, texts: list[str]) -> float:
    """Share of positions at which both engines' first choices are the same."""
    same = total = 0
    for text in texts[:20]:
        ids = np.array(model.tokenizer.encode(text), np.int32)[: model.config.context - 1]
        choices: list[list[np.ndarray]] = []
        for each in (engine, exact):
            found: list[np.ndarray] = []
            each.release(each.start(ids, lambda _, __, row, to=found: to.append(row.argmax(1))))
            choices.append(found)
        left, right = (np.concatenate(found) for found in choices)
        same, total = same + int((left == right).sum()), total + len(left)
    return same / total


def table(path: Path, count: int, cached: bool) -> str:
    """One model."""
    model = load(path)
    start = model.config.bos if model.config.bos is not None else model.config.eos[0]
    sources = documents(count)
    lines = [
        f"**{path.name}**",
        "",
        "| format | size | " + " | ".join(sources) + " | same choice |",
    ]
    lines.append("|---" * (len(sources) + 3) + "|")
    exact = NativeEngine(model.config, model.weights, format="fp32")
    base: dict[str, float] = {}
    for name in KV_FORMATS if cached else (*FORMATS, *HEADS):
        option = {"kv_format" if cached else "format": name}
        try:
            engine = NativeEngine(model.config, model.weights, **option)
        except NotTernaryError:
            continue
        cells = []
        for source, texts in sources.items():
            ids = [(model.tokenizer.encode(t, special=False), len(t.encode())) for t in texts]
            bits = predict(engine, ids, start, model.config.context - 1).bits_per_byte
            base.setdefault(source, bits)
            cells.append(f"{bits:.4f} ({bits / base[source] - 1:+.2%})")
        share = agreement(model, engine, exact, sources["stories-val"])
        size = f"{engine.weight_bytes / 1e6:.1f} MB"
        if cached:
            size = f"{engine.position_bytes:.0f} B a position"
        label = name if cached else engine.format
        lines.append(f"| {label} | {size} | " + " | ".join(cells) + f" | {share:.1%} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--kv", action="store_true", help="formats of the cache")
    options = parser.parse_args()
    for path in options.models:
        print(table(path, options.documents, options.kv), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
