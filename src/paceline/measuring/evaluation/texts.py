"""How well a model predicts a text: in windows of its tokens, or in documents of bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paceline.errors import RequestError
from paceline.lm import LM
from paceline.measuring.evaluation.base import Item, Kind, Metric, Result, Suite, item_key
from paceline.measuring.evaluation.data import is_any_text, is_text, read_rows
from paceline.measuring.quality import WINDOW, score_window, text_windows
from paceline.models.tokenizer import Tokenizer
from paceline.scoring import check_finite

_DOCUMENT = 2000  # characters of a document of a plain text, at least
_BITS = 1 / np.log(2)


def read_documents(path: Path) -> list[str]:
    """Return the documents of a text file: of JSON lines each `text`, else pieces of whole lines.

    Files may be compressed with gzip.

    Raises:
        RequestError: the file cannot be read, or is empty.
    """
    if ".jsonl" in path.suffixes:
        documents = [row["text"] for row in read_rows(path, {"text": is_any_text})]
        documents = [document for document in documents if is_text(document)]
    else:
        documents = list(_pieces(_read(path)))
    if not documents:
        raise RequestError(f"{path} holds no text")
    return documents


def _read(path: Path) -> str:
    import gzip
    import zlib

    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise RequestError(f"{path} is no whole gzip file; fetch it again") from None
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from None


def _pieces(text: str) -> Iterator[str]:
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= _DOCUMENT:
            yield "".join(piece)
            piece, size = [], 0
    rest = "".join(piece)
    if rest.strip():
        yield rest


class TextWindows(Suite):
    """A text in windows of 512 tokens, each with its own start; what is left at its end is dropped.

    Args:
        name: of the text.
        documents: its parts, which are joined.
        tokenizer: makes the tokens; that of all models that are compared.
        size: tokens of a window.
        limit: at most so many windows.

    Raises:
        RequestError: the text is shorter than two windows.
    """

    metrics = (
        Metric("nats a token", Kind.MEAN, "nats"),
        Metric("bits a byte", Kind.RATIO, "bits", "bytes"),
    )
    batch = 1

    def __init__(
        self,
        name: str,
        documents: Sequence[str],
        tokenizer: Tokenizer,
        size: int = WINDOW,
        limit: int | None = None,
    ) -> None:
        self.name = name
        separator = "" if _are_pieces(documents) else "\n\n"
        windows = text_windows(tokenizer, separator.join(documents), size, limit)
        self._window = windows.tokens.shape[1]
        begin = len(tokenizer.encode("")[:1])
        self.items = [
            Item(
                (row, len(tokenizer.decode(row[begin:].tolist()).encode())), item_key(row.tolist())
            )
            for row in windows.tokens
        ]

    def settings(self, lm: LM) -> dict[str, Any]:
        """Return the size of a window."""
        return {"window": self._window}

    def score(self, lm: LM, items: Sequence[Item]) -> list[Result]:
        """Return for each window its mean nats a token, bits, bytes and most likely tokens."""
        results = []
        for item in items:
            row, size = item.content
            nats, firsts = score_window(lm.engine, row)
            check_finite((-nats).tolist())
            results.append(
                {
                    "nats": float(nats.mean()),
                    "bits": float(nats.sum() * _BITS),
                    "bytes": size,
                    "firsts": firsts.tolist(),
                }
            )
        return results

    def is_sound(self, result: object) -> bool:
        """Return whether a stored result has all that is measured of a window."""
        if not super().is_sound(result) or not isinstance(result, dict):
            return False
        firsts = result.get("firsts")
        return isinstance(firsts, list) and len(firsts) == self._window - 1

    def compare(self, ours: Sequence[Result], base: Sequence[Result]) -> dict[str, Any]:
        """Return the share of positions at which both have the same most likely token."""
        pairs = zip(ours, base, strict=True)
        same = [np.mean(np.equal(a["firsts"], b["firsts"])) for a, b in pairs]
        return {"equal_most_likely": float(np.mean(same))}


def _are_pieces(documents: Sequence[str]) -> bool:
    """Return whether documents are pieces of one text, which end in line ends."""
    return all(document.endswith(("\n", "\r")) for document in documents[:-1])


class TextDocuments(Suite):
    """A text in documents, for models with different tokenizers: bits a byte are comparable.

    Each document is read in windows of at most 512 tokens, each of them after the token that begins
    a text, or the one that ends it where there is none.

    Args:
        name: of the text.
        documents: its parts.
        limit: at most so many.

    Raises:
        RequestError: there is only one document.
    """

    metrics = (Metric("bits a byte", Kind.RATIO, "bits", "bytes"),)
    batch = 1

    def __init__(self, name: str, documents: Sequence[str], limit: int | None = None) -> None:
        self.name = name
        self.items = [Item(each, item_key(each)) for each in documents[:limit]]
        if len(self.items) < 2:
            raise RequestError(
                f"{name} has {len(self.items)} document, expected at least 2 to compare models "
                "with different tokenizers"
            )

    def settings(self, lm: LM) -> dict[str, Any]:
        """Return the size of a window and the token before it."""
        return {"window": _window(lm), "prefix": lm.tokenizer.token(_start(lm.tokenizer))}

    def score(self, lm: LM, items: Sequence[Item]) -> list[Result]:
        """Return for each document its bits and bytes."""
        start, step = _start(lm.tokenizer), _window(lm) - 1
        results = []
        for item in items:
            ids = lm.tokenizer.encode(item.content, False)
            nats = 0.0
            for begin in range(0, len(ids), step):
                window = np.array([start, *ids[begin : begin + step]], np.int32)
                losses, _ = score_window(lm.engine, window)
                check_finite((-losses).tolist())
                nats += float(losses.sum())
            results.append({"bits": nats * float(_BITS), "bytes": len(item.content.encode())})
        return results


def _window(lm: LM) -> int:
    return min(WINDOW, lm.engine.config.context)


def _start(tokenizer: Tokenizer) -> int:
    """Return the token before a text.

    Raises:
        RequestError: the tokenizer has none.
    """
    usual = tokenizer.encode("")[:1]
    tokens = [*usual, tokenizer.special_id("bos_token"), tokenizer.special_id("eos_token")]
    start = next((token for token in tokens if token is not None), None)
    if start is None:
        raise RequestError(
            "a tokenizer has no token that begins or ends a text, so that models with different "
            "tokenizers cannot be compared; take a base with the same tokenizer"
        )
    return start
