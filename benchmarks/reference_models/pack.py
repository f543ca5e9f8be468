"""Turn the sources into token streams for training.

    python -m benchmarks.reference_models.pack --work build/reference

Writes SOURCE.train.npy and SOURCE.validation.npy, uint16 [tokens], and pack.json, what they hold.
Every document begins with the end-of-text token, which nothing else contains. The number of
processes changes nothing.
"""

import argparse
import json
import os
import time
from collections.abc import Iterable
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from benchmarks.reference_models.sources import CHATS, SHARED, SOURCES, TOKENIZER, read

Stream = NDArray[np.uint16]

_tokenizer: Tokenizer | None = None


def _begin(folder: Path) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))


def _encode(document: str, chat: bool) -> Stream:
    assert _tokenizer is not None
    return encode(_tokenizer, document, chat)


def encode(tokenizer: Tokenizer, document: str, chat: bool) -> Stream:
    """Encode a document [tokens]. Only a chat's markers are read as special tokens."""
    tokenizer.encode_special_tokens = not chat
    return np.array(tokenizer.encode(document).ids, np.uint16)


def _join(streams: Iterable[Stream]) -> Stream:
    return np.concatenate([np.zeros(0, np.uint16), *streams])


def pack(shared: Path, work: Path, tokenizer: Path = TOKENIZER, processes: int = 1) -> None:
    """Write the streams to `work`, once."""
    if (work / "pack.json").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    facts: dict[str, dict[str, dict[str, int]]] = {}
    with get_context("spawn").Pool(processes, _begin, (tokenizer,)) as pool:
        for name in SOURCES:
            facts[name] = {}
            to_tokens = partial(_encode, chat=name in CHATS)
            for part, documents in zip(("train", "validation"), read(name, shared), strict=True):
                stream = _join(pool.imap(to_tokens, documents, chunksize=4))
                np.save(work / f"{name}.{part}.npy", stream)
                facts[name][part] = {
                    "documents": len(documents),
                    "bytes": sum(len(each.encode()) for each in documents),
                    "tokens": len(stream),
                }
    (work / "pack.json").write_text(json.dumps(facts, indent=2) + "\n")


def table(facts: dict[str, dict[str, dict[str, int]]]) -> str:
    """Return what was packed as Markdown."""
    lines = [
        "| source | documents | MB | tokens | held out: documents | kB | tokens |",
        "|---" * 7 + "|",
    ]
    for name, parts in facts.items():
        train, held = parts["train"], parts["validation"]
        lines.append(
            f"| {name} | {train['documents']:,} | {train['bytes'] / 1e6:.1f} | {train['tokens']:,} "
            f"| {held['documents']:,} | {held['bytes'] / 1e3:.0f} | {held['tokens']:,} |"
        )
    every = [sum(p[part]["tokens"] for p in facts.values()) for part in ("train", "validation")]
    lines.append(f"| all | | | {every[0]:,} | | | {every[1]:,} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    began = time.monotonic()
    pack(options.shared, options.work, processes=options.processes)
    print(table(json.loads((options.work / "pack.json").read_text())))
    print(f"\n{time.monotonic() - began:.0f} seconds")


if __name__ == "__main__":
    main()
