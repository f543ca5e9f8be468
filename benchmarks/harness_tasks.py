"""Tasks of lm-evaluation-harness on texts of `../shared`, so that nothing is fetched from a hub."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

Document = dict[str, Any]

ACCURACY = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
PERPLEXITY = [
    {"metric": name, "aggregation": aggregation, "higher_is_better": False}
    for name, aggregation in (
        ("word_perplexity", "weighted_perplexity"),
        ("bits_per_byte", "bits_per_byte"),
    )
]
WORD = [
    {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
]
# As JSON, which is YAML: what is scored of a document, and how.
TASKS: dict[str, dict[str, Any]] = {
    "local_blimp": {
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
        "metric_list": ACCURACY,
    },
    "local_lambada": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": WORD,
    },
    "local_wikitext": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": PERPLEXITY,
    },
    "local_gsm8k": {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer.split('####')[-1].strip()}}",
        "generation_kwargs": {"until": ["Question:", "\n\n"], "max_gen_toks": 48},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def write_tasks(folder: Path, shared: Path, count: int, characters: int | None = None) -> list[str]:
    """Write tasks and their documents into a folder for `--include_path`; return their names.

    Args:
        folder: is filled.
        shared: holds `data/`.
        count: how many documents of each task.
        characters: of each article that is read whole; None: all.
    """
    documents = {
        "local_blimp": _spread(_lines(shared / "data/blimp/blimp.jsonl.gz"), 67_000, count),
        "local_lambada": _lines(shared / "data/lambada/lambada_test.jsonl.gz"),
        "local_wikitext": _articles(shared / "data/wikitext-2/valid.tokens.txt.gz", characters),
        "local_gsm8k": _lines(shared / "data/gsm8k/test.jsonl.gz"),
    }
    for name, task in TASKS.items():
        path = folder / f"{name}.jsonl"
        with path.open("w") as file:
            for document in islice(documents[name], count):
                file.write(json.dumps(document) + "\n")
        settings = task | {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path)}},
            "test_split": "test",
            "metadata": {"version": 1.0},
        }
        (folder / f"{name}.yaml").write_text(json.dumps(settings, indent=2))
    return list(TASKS)


def _lines(path: Path) -> Iterator[Document]:
    with gzip.open(path, "rt") as file:
        for line in file:
            yield json.loads(line)


def _spread(documents: Iterator[Document], total: int, count: int) -> Iterator[Document]:
    """Every so many documents, so that `count` are of all kinds."""
    return islice(documents, 0, None, max(total // count, 1))


def _articles(path: Path, characters: int | None) -> Iterator[Document]:
    """The articles of Wikitext, which begin with a heading ` = Title = `."""
    with gzip.open(path, "rt") as file:
        article: list[str] = []
        for line in file:
            if line.startswith(" = ") and not line.startswith(" = = ") and article:
                yield {"text": "".join(article)[:characters]}
                article = []
            article.append(line)
        yield {"text": "".join(article)[:characters]}
