"""Texts that a model is calibrated on."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from paceline.errors import RequestError

if TYPE_CHECKING:
    from paceline.models import Model

# Writes so many tokens of the model's own, int [tokens] or a few more.
Writer = Callable[[int], NDArray[Any]]

# Modules of the standard library whose source is the code of the default mix.
_CODE: tuple[str, ...] = (
    *("argparse", "ast", "collections", "csv", "difflib", "fractions", "heapq", "inspect"),
    *("json.decoder", "logging", "pathlib", "random", "statistics", "string", "tarfile"),
)
# Others, on which the loss is measured where no text is named.
_HELD_OUT = ("doctest", "textwrap", "typing", "turtle", "sched", "mailbox", "zipfile", "shlex")
DEFAULT, OWN = "mixed", "own"


@dataclass(frozen=True)
class Calibration:
    """Calibration texts in tokens.

    Attributes:
        tokens: int64 [B, T], each row the beginning of a context.
        origin: where they are from, for the card.
    """

    tokens: NDArray[np.int64]
    origin: str

    def digest(self) -> str:
        """Return a hash of the tokens."""
        return hashlib.sha256(self.tokens.tobytes()).hexdigest()[:24]


def calibration(
    model: Model,
    source: str = DEFAULT,
    count: int = 64,
    length: int = 512,
    seed: int = 0,
    own: Writer | None = None,
) -> Calibration:
    """Return `count` texts of `length` tokens.

    Args:
        model: its tokenizer, and the begin-of-text token that every row starts with where the
            tokenizer puts one before texts.
        source: `mixed`: half of the rows written by the model, whose texts are more varied than
            any others at hand, the rest documentation and code of the running Python; `own`: what
            the model writes; or a file, text or `.jsonl` with `text` in every line.
        count: rows.
        length: tokens of a row; at most the context.
        seed: of the choice of the rows.
        own: writes the model's own texts; without it the mix has none.

    Raises:
        RequestError: a file is missing or too short.
    """
    length = min(length, model.config.context)
    if source == OWN:
        if own is None:
            raise RequestError("the model's own texts need an engine that runs it")
        stream = np.asarray(own(count * length), np.int64)
        return Calibration(_rows(model, stream, count, length, seed, OWN), "the model's own texts")
    if source != DEFAULT:
        stream = _encode(model, _read(Path(source)))
        rows = _rows(model, stream, count, length, seed, source)
        return Calibration(rows, Path(source).name)
    written = count // 2 if own is not None else 0
    code = (count - written) // 2
    prose = count - written - code
    parts = [
        _rows(model, _encode(model, _prose()), prose, length, seed, "documentation"),
        _rows(model, _encode(model, _code()), code, length, seed, "code"),
    ]
    origin = f"{prose} texts of documentation, {code} of code"
    if written and own is not None:
        stream = np.asarray(own(written * length), np.int64)
        parts.append(_rows(model, stream, written, length, seed, OWN))
        origin += f", {written} that the model wrote"
    return Calibration(np.concatenate(parts), origin)


def _rows(
    model: Model, stream: NDArray[np.int64], count: int, length: int, seed: int, what: str
) -> NDArray[np.int64]:
    """Cut a stream of tokens into pieces and return some of them, each after the opening."""
    opening = np.array(model.tokenizer.encode("")[:1], np.int64)
    step = length - len(opening)
    pieces = len(stream) // step
    if pieces < count:
        raise RequestError(
            f"the calibration text {what} has {len(stream)} tokens, expected at least "
            f"{count * step} for {count} rows of {length}; give more text, or fewer rows"
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(pieces)[:count])
    cut = stream[: pieces * step].reshape(pieces, step)[chosen]
    return np.concatenate([np.tile(opening, (count, 1)), cut], axis=1)


def _encode(model: Model, texts: Iterator[str]) -> NDArray[np.int64]:
    opening = len(model.tokenizer.encode(""))
    parts = [model.tokenizer.encode(text)[opening:] for text in texts]
    return np.concatenate([np.array(part, np.int64) for part in parts])


def _read(path: Path) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise RequestError(f"cannot read the calibration text {path}: {reason}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start})") from None
    if path.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (ValueError, TypeError, KeyError, RecursionError):
            document = None
        if not isinstance(document, str):
            raise RequestError(f"line {number} of {path} is no JSON object with a text `text`")
        yield document


def _prose() -> Iterator[str]:
    topics = importlib.import_module("pydoc_data.topics").topics
    yield from (topics[name] for name in sorted(topics))


def held_out() -> str:
    """Return a text that is no part of the default calibration: modules of the standard library."""
    return "\n".join(map(_source, _HELD_OUT))


def _code() -> Iterator[str]:
    yield from map(_source, _CODE)


def _source(name: str) -> str:
    """Return the source of a module, which is not run; empty where it is not installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return ""
    return Path(spec.origin).read_text(encoding="utf-8")
