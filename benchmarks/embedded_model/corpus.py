"""The text the embedded model learns from: public-domain books for children, made uniform."""

import hashlib
import json
import lzma
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 1024
CHUNK_CHARACTERS = 3000
VALIDATION_PERCENT = 1

BOOKS = (
    "Anna Sewell/Black Beauty.md",
    "Beatrix Potter/Great Big Treasury of Beatrix Potter.md",
    "Carlo Collodi/The Adventures of Pinocchio.md",
    "Edith Nesbit/Five Children and It.md",
    "Edith Nesbit/The Railway Children.md",
    "Frances Hodgson Burnett/A Little Princess.md",
    "Frances Hodgson Burnett/The Secret Garden.md",
    "Gabrielle-Suzanne Barbot de Villeneuve/Beauty and the Beast.md",
    "Gertrude Chandler Warner/The Boxcar Children.md",
    "Hans Christian Andersen/Andersen's Fairy Tales.md",
    "Henry van Dyke/The First Christmas Tree.md",
    "Howard Pyle/The Merry Adventures of Robin Hood.md",
    "Hugh Lofting/The Story of Doctor Dolittle.md",
    "Johann David Wyss/Swiss Family Robinson.md",
    "John Kendrick Bangs/A Little Book of Christmas.md",
    "Kenneth Grahame/The Wind in the Willows.md",
    "L. Frank Baum/Dorothy and the Wizard in Oz.md",
    "Louisa May Alcott/Jo's Boys.md",
    "Lucy Maud Montgomery/Christmas Stories.md",
    "Lucy Maud Montgomery/Emily of New Moon.md",
    "Lucy Maud Montgomery/Rainbow Valley.md",
)

# One spelling per mark: a tiny model has no capacity to spare for typography.
SPELLINGS = str.maketrans(
    {"—": "--", "…": "...", "_": "", "*": ""}
    | dict.fromkeys("\u2018\u2019", "'")
    | dict.fromkeys("\u201c\u201d", '"')
    | dict.fromkeys("\u200b\u2060\ufeff", "")
)
NOT_PROSE = re.compile(r"[#\[|]|(published|translated|illustrat)|\W*$", re.IGNORECASE)


def paragraphs(book: str) -> Iterator[str]:
    """Yield the prose of one markdown book, without title block, headings, notes and ornaments."""
    body = re.split(r"^-{3,}$", book, maxsplit=1, flags=re.MULTILINE)[-1]
    for paragraph in re.split(r"\n\s*\n", body):
        text = " ".join(paragraph.translate(SPELLINGS).split())
        if not NOT_PROSE.match(text):
            yield re.sub(r"-{2,}", "--", re.sub(r"\[[^\]]*\]", "", text))


def chunks(book: str) -> Iterator[str]:
    """Group paragraphs into texts of about `CHUNK_CHARACTERS`, the unit of the split."""
    group: list[str] = []
    for paragraph in paragraphs(book):
        group.append(paragraph)
        if sum(map(len, group)) >= CHUNK_CHARACTERS:
            yield "\n\n".join(group)
            group = []
    if group:
        yield "\n\n".join(group)


def is_validation(chunk: str) -> bool:
    """Decide by content alone, so that the split survives a change of the book list."""
    digest = hashlib.sha256(chunk.encode()).digest()
    return int.from_bytes(digest[:4]) % 100 < VALIDATION_PERCENT


def read_chunks(archive: Path) -> list[str]:
    """Read the chosen books, in the order of `BOOKS`."""
    with lzma.open(archive, "rt", encoding="utf-8") as lines:
        texts = {book["path"]: book["text"] for book in map(json.loads, lines)}
    missing = [path for path in BOOKS if path not in texts]
    if missing:
        raise SystemExit(f"{archive} lacks {missing}; use the archive named in the README")
    return [chunk for path in BOOKS for chunk in chunks(texts[path])]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train byte-level BPE: all 256 bytes are pieces, so that any text survives a round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> NDArray[np.uint16]:
    """Encode texts into one stream [tokens], each text preceded by the end-of-text token."""
    boundary = [tokenizer.token_to_id(END_OF_TEXT)]
    encoded = tokenizer.encode_batch(texts)
    return np.array([i for e in encoded for i in boundary + e.ids], dtype=np.uint16)


def prepare(archive: Path, work: Path) -> None:
    """Write tokenizer.json, train.npy, validation.npy and corpus.json to `work`, once."""
    if (work / "corpus.json").exists():
        return
    texts = read_chunks(archive)
    split = {
        "train": [text for text in texts if not is_validation(text)],
        "validation": [text for text in texts if is_validation(text)],
    }
    tokenizer = train_tokenizer(split["train"])
    tokenizer.save(str(work / "tokenizer.json"))
    facts = {}
    for name, part in split.items():
        tokens = encode(tokenizer, part)
        np.save(work / f"{name}.npy", tokens)
        size = sum(len(text.encode()) for text in part)
        facts[name] = {"chunks": len(part), "bytes": size, "tokens": len(tokens)}
    (work / "corpus.json").write_text(json.dumps(facts, indent=2) + "\n")
