"""The training text: which documents there are and which of them are held out.

`shared` below is a folder with `text/*.jsonl.xz`, `data/gsm8k` and `data/mbpp`.
"""

import gzip
import hashlib
import json
import lzma
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[2] / "shared"
TOKENIZER = HERE / "tokenizer"
EXCLUDED = HERE / "excluded.json"  # written by contamination.py

END_OF_TEXT = "<|endoftext|>"
USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
VALIDATION_SHARE = 0.005  # of a source's bytes
MBPP_TEST = range(11, 511)  # task ids; the split of its authors, left out

Reader = Callable[[Path], Iterator[str]]


def archive(name: str, shared: Path) -> Iterator[str]:
    """Yield the documents of `text/NAME.jsonl.xz`."""
    with lzma.open(shared / "text" / f"{name}.jsonl.xz", "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def conversation(question: str, answer: str) -> str:
    """Render one exchange as chat_template.jinja does, with the end of the answer."""
    return f"{USER}{question.strip()}{END}{ASSISTANT}{answer.strip()}{END}"


def gsm8k(shared: Path) -> Iterator[str]:
    """Yield GSM8K's training problems, without the calculator's notes."""
    text = gzip.decompress((shared / "data/gsm8k/train.jsonl.gz").read_bytes()).decode()
    for line in text.splitlines():
        row = json.loads(line)
        yield conversation(row["question"], re.sub(r"<<.*?>>", "", row["answer"]))


def mbpp(shared: Path) -> Iterator[str]:
    """Yield MBPP's tasks but for its test split, each with its first assertion."""
    for line in (shared / "data/mbpp/mbpp.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        if row["task_id"] in MBPP_TEST:
            continue
        code = re.sub(r"\s*\r?\n", "\n", row["code"].replace("\t", "    "))
        task = f"{row['text'].strip()}\n{row['test_list'][0]}"
        yield conversation(task, f"```python\n{code}\n```")


TEXTS = ("classic-books", "wikipedia-en", "peps", "python-stdlib", "rust-book")
CHATS: dict[str, Reader] = {"gsm8k-train": gsm8k, "mbpp": mbpp}
SOURCES: dict[str, Reader] = {name: partial(archive, name) for name in TEXTS} | CHATS


def digest(document: str) -> str:
    """Return what a document is known by."""
    return hashlib.sha256(document.encode()).hexdigest()[:16]


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """Divide a source into training and validation.

    Validation are the documents of lowest hash, up to `VALIDATION_SHARE` of the bytes and at least
    one. Both parts keep the order of the source.
    """
    sizes = {digest(each): len(each.encode()) for each in documents}
    held, size, limit = set(), 0, VALIDATION_SHARE * sum(len(d.encode()) for d in documents)
    for name in sorted(sizes):
        if size >= limit:
            break
        held.add(name)
        size += sizes[name]
    train = [each for each in documents if digest(each) not in held]
    return train, [each for each in documents if digest(each) in held]


def read(name: str, shared: Path) -> tuple[list[str], list[str]]:
    """Read a source: its training and validation documents, contaminated ones left out of both."""
    excluded = json.loads(EXCLUDED.read_text())["excluded"] if EXCLUDED.exists() else {}
    documents = [d for d in SOURCES[name](shared) if digest(d) not in excluded.get(name, {})]
    return split(documents)
