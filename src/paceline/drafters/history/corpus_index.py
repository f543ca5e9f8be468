"""A tokenised corpus with its suffix array in one safetensors file, mapped into memory.

Tensors: `tokens` int32 [N], with -1 after every document; `suffixes` int32 [N], the starts of its
suffixes in order; `tokenizer` uint8 [32], the fingerprint of the tokenizer that made the tokens.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, TextIO

import numpy as np

from paceline import _native
from paceline.core import Tokens
from paceline.errors import MethodError, RequestError
from paceline.models.formats.safetensors import read_file
from paceline.models.formats.writer import Pending, write_safetensors
from paceline.models.tokenizer import Tokenizer

_PIECE = 1 << 18  # characters of plain text that are tokenised at once
_MAX_TOKENS = (1 << 31) - 1
_UNPACK: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".xz": lzma.LZMAFile,
}


@dataclass(frozen=True, slots=True, eq=False)
class CorpusIndex:
    """Tokens and suffixes, int32 [N] each; views of the mapped file if read from one."""

    tokens: Tokens
    suffixes: Tokens


@dataclass(frozen=True, slots=True)
class Read:
    """A tokenised corpus.

    Attributes:
        tokens: int32 [N].
        documents: number of documents that were read to their end.
        complete: whether all texts were read before the limit.
    """

    tokens: Tokens
    documents: int
    complete: bool


def tokenise(
    paths: list[Path],
    tokenizer: Tokenizer,
    limit: int,
    progress: Callable[[int], None] = lambda _: None,
    more: Iterable[str] = (),
) -> Read:
    """Tokenise texts up to a limit, with one document in memory at a time.

    A `.jsonl` file has an object with `text` a line, each a document; any other file is a document
    of plain text. Both may be compressed (`.gz`, `.xz`).

    Args:
        paths: the files, in order.
        tokenizer: of the model that will use the corpus.
        limit: most tokens.
        progress: called with the number of bytes read since the last call.
        more: documents behind those of the files.

    Raises:
        RequestError: a file cannot be read, a line is no such object, or there is no token.
    """
    parts: list[Tokens] = []
    size = documents = 0
    end = np.array([-1], np.int32)
    files = (piece for path in paths for piece in _texts(path, progress))
    for text, ends in chain(files, ((text, True) for text in more)):
        ids = np.array(tokenizer.encode(text, special=False), np.int32)
        parts += [ids, end] if ends else [ids]
        size += len(ids) + ends
        documents += ends
        if size > limit:
            return Read(np.concatenate(parts)[:limit], documents, False)
    tokens = np.concatenate(parts) if parts else end
    if tokens.max() < 0:
        raise RequestError(f"{', '.join(map(str, paths))}: there is no text in it")
    return Read(tokens, documents, True)


def write_corpus(path: Path, tokens: Tokens, tokenizer: Tokenizer) -> None:
    """Sort the suffixes and write the file, which appears under its name when it is complete.

    Raises:
        RequestError: too many tokens.
        ModelError: it cannot be written.
    """
    if len(tokens) > _MAX_TOKENS:
        raise RequestError(f"the corpus has {len(tokens)} tokens, expected at most {_MAX_TOKENS}")
    suffixes = _native.suffix_array(tokens)
    mark = np.frombuffer(tokenizer.fingerprint(), np.uint8)
    write_safetensors(
        path,
        {
            "tokens": Pending(tokens.shape, lambda: tokens, "I32"),
            "suffixes": Pending(suffixes.shape, lambda: suffixes, "I32"),
            "tokenizer": Pending(mark.shape, lambda: mark, "U8"),
        },
    )


def open_corpus(path: Path, tokenizer: Tokenizer, vocab_size: int) -> CorpusIndex:
    """Map a file that `write_corpus` wrote.

    Raises:
        MethodError: it is something else, or of another tokenizer.
        ModelError: it cannot be read, or is truncated.
    """
    tensors = {name: stored.values for name, stored in read_file(path).items()}
    kinds = {name: (values.dtype, values.ndim) for name, values in tensors.items()}
    integers = (np.dtype(np.int32), 1)
    expected = {"tokens": integers, "suffixes": integers, "tokenizer": (np.dtype(np.uint8), 1)}
    if kinds != expected or len(tensors["tokens"]) != len(tensors["suffixes"]):
        raise MethodError(f"{path} is no datastore; make one with `paceline index-corpus`")
    if tensors["tokenizer"].tobytes() != tokenizer.fingerprint():
        raise MethodError(
            f"{path} was made with another tokenizer than the model's; "
            "make one for this model with `paceline index-corpus`"
        )
    tokens = tensors["tokens"]
    if not len(tokens) or tokens.min() < -1 or tokens.max() >= vocab_size:
        raise MethodError(
            f"{path} holds tokens that the model lacks; make it again with `paceline index-corpus`"
        )
    return CorpusIndex(tokens, tensors["suffixes"])


def _texts(path: Path, progress: Callable[[int], None]) -> Iterator[tuple[str, bool]]:
    """Yield pieces of text, and whether a document ends with each."""
    lined = path.suffix == ".jsonl" or path.name.endswith((".jsonl.gz", ".jsonl.xz"))
    try:
        with path.open("rb") as raw, _text(path, raw) as file:
            counted = 0
            for piece in _lines(path, file) if lined else _pieces(file):
                yield piece
                progress(raw.tell() - counted)
                counted = raw.tell()
            progress(path.stat().st_size - counted)
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except (lzma.LZMAError, EOFError, gzip.BadGzipFile) as error:
        raise RequestError(f"{path} is damaged: {error}") from None
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror or error}") from None


def _text(path: Path, raw: IO[bytes]) -> TextIO:
    unpack = _UNPACK.get(path.suffix)
    return io.TextIOWrapper(unpack(raw) if unpack else raw, encoding="utf-8", newline="")


def _pieces(file: TextIO) -> Iterator[tuple[str, bool]]:
    piece = file.read(_PIECE)
    while piece:
        following = file.read(_PIECE)
        yield piece, not following
        piece = following


def _lines(path: Path, file: TextIO) -> Iterator[tuple[str, bool]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise RequestError(f"{path}: line {number} is no JSON object with a `text`")
        if text:
            yield text, True
