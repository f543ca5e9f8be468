"""Look for the evaluation sets in the training text, and list the documents to leave out.

    python -m benchmarks.reference_models.contamination

Texts are compared as lower-case words and numbers without punctuation. A training document is
contaminated if it holds any 13 successive words of an evaluation item, or a whole item of 8 to 12.
Items shorter than 8 words are not looked for: such phrases are common property.
"""

import argparse
import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.reference_models.sources import EXCLUDED, SHARED, SOURCES, digest

LONG, SHORT = 13, 8  # words
WORD = re.compile(r"[^\W_]+")

Phrases = dict[str, dict[tuple[str, ...], str]]  # first words -> phrase -> evaluation set


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    data = path.read_bytes()
    text = gzip.decompress(data) if path.suffix == ".gz" else data
    return (json.loads(line) for line in text.decode().splitlines())


def evaluation(shared: Path) -> dict[str, list[str]]:
    """Return the texts that no model of the family may have read."""
    data = shared / "data"
    stories = data / "stories-val" / "soda-tinystories-instruct_val.txt.gz"
    wikitext = data / "wikitext-2" / "valid.tokens.txt.gz"
    turns = [line for row in _rows(data / "spec-bench/question.jsonl") for line in row["turns"]]
    problems = list(_rows(data / "gsm8k/test.jsonl.gz"))
    return {
        "blimp": [row["sentence_good"] for row in _rows(data / "blimp/blimp.jsonl.gz")],
        "lambada": [row["text"] for row in _rows(data / "lambada/lambada_test.jsonl.gz")],
        "spec-bench": turns,
        "gsm8k-test": [f"{row['question']} {row['answer']}" for row in problems],
        "stories-val": gzip.decompress(stories.read_bytes()).decode().split("<|endoftext|>"),
        "wikitext-2": gzip.decompress(wikitext.read_bytes()).decode().splitlines(),
    }


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def phrases(sets: dict[str, list[str]]) -> Phrases:
    """Index what is looked for by its first `SHORT` words."""
    found: Phrases = defaultdict(dict)
    for name, items in sets.items():
        for item in map(words, items):
            size = min(len(item), LONG)
            if size < SHORT:
                continue
            for start in range(len(item) - size + 1):
                phrase = tuple(item[start : start + size])
                found[" ".join(phrase[:SHORT])][phrase] = name
    return dict(found)


def search(document: str, index: Phrases) -> dict[str, str]:
    """Return evaluation set -> a phrase of it that the document holds."""
    held, found = words(document), {}
    for start in range(len(held) - SHORT + 1):
        for phrase, name in index.get(" ".join(held[start : start + SHORT]), {}).items():
            if tuple(held[start : start + len(phrase)]) == phrase:
                found[name] = " ".join(phrase)
    return found


_index: Phrases = {}


def _begin(shared: Path) -> None:
    _index.update(phrases(evaluation(shared)))


def _search(document: str) -> tuple[str, dict[str, str]]:
    return digest(document), search(document, _index)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    excluded: dict[str, dict[str, dict[str, str]]] = {}
    with get_context("spawn").Pool(options.processes, _begin, (options.shared,)) as pool:
        for name, reader in SOURCES.items():
            found = dict(pool.imap(_search, reader(options.shared), chunksize=16))
            excluded[name] = {mark: hits for mark, hits in found.items() if hits}
            sets = Counter(each for hits in excluded[name].values() for each in hits)
            print(f"{name}: {len(excluded[name])} of {len(found)} documents, {dict(sets)}")
    looked = {name: len(items) for name, items in evaluation(options.shared).items()}
    text = json.dumps({"evaluation": looked, "excluded": excluded}, indent=1, ensure_ascii=False)
    EXCLUDED.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
