"""Reads the files of benchmark suites: JSON lines, plain or compressed with gzip or xz."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from paceline.errors import RequestError

Row = dict[str, Any]
_LINE = 1 << 24  # characters of a line
_TOTAL = 1 << 30  # characters of a file
_SHOWN = 80  # characters of a bad value
_OPENERS: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}


def find_files(folder: Path, suite: str, patterns: tuple[str, ...]) -> list[Path]:
    """Return the files of a suite, in `folder/suite` or in `folder` itself, sorted.

    Args:
        folder: that `--data` names.
        suite: name of the suite and of its sub-folder.
        patterns: of names, without `.gz` or `.xz`; the first one that any file has is taken.

    Raises:
        RequestError: there is no such folder, or no such file in it.
    """
    places = [place for place in (folder / suite, folder) if place.is_dir()]
    if not places:
        raise RequestError(f"there is no folder {folder}; --data names the data of the suites")
    for place in places:
        for pattern in patterns:
            found = chain.from_iterable(place.glob(pattern + end) for end in ("", *_OPENERS))
            files = sorted(path for path in found if path.is_file())
            if files:
                return files
    wanted = " or ".join(patterns)
    raise RequestError(
        f"{places[0]} has no data of {suite}: expected {wanted}, or the same with .gz or .xz"
    )


def find_file(folder: Path, suite: str, *patterns: str) -> Path:
    """Return the one file of a suite; see `find_files`.

    Raises:
        RequestError: as `find_files`, or there are several.
    """
    files = find_files(folder, suite, patterns)
    if len(files) > 1:
        names = ", ".join(path.name for path in files[:4])
        raise RequestError(f"{files[0].parent} has several files of {suite}: {names}; keep one")
    return files[0]


def read_rows(path: Path, fields: Mapping[str, Callable[[object], bool]]) -> Iterator[Row]:
    """Read a file of JSON objects, one a line; empty lines are skipped.

    Args:
        path: of the file; compressed if it ends in `.gz` or `.xz`.
        fields: that every row must have, with what accepts its value.

    Raises:
        RequestError: the file cannot be read, or a line is bad, by its number.
    """
    opened = _OPENERS.get(path.suffix, open)
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            for number, line in _lines(path, file):
                if line.strip():
                    yield _row(path, number, line, fields)
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError):
        raise RequestError(f"{path} is no whole {path.suffix} file; fetch it again") from None
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from None


def _lines(path: Path, file: TextIO) -> Iterator[tuple[int, str]]:
    number = total = 0
    while line := file.readline(_LINE):
        number += 1
        total += len(line)
        if len(line) == _LINE or total > _TOTAL:
            raise RequestError(f"{path} is too long at line {number} for the data of a suite")
        yield number, line


def _row(path: Path, number: int, line: str, fields: Mapping[str, Callable[[object], bool]]) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise RequestError(f"{path}: line {number} is not JSON") from None
    if not isinstance(row, dict):
        raise RequestError(f"{path}: line {number} is no JSON object")
    for name, accepts in fields.items():
        if name not in row:
            raise RequestError(f"{path}: line {number} has no {name!r}")
        if not accepts(row[name]):
            shown = f"{row[name]!a:.{_SHOWN}}"
            raise RequestError(f"{path}: line {number} has {shown} as {name!r}")
    return row


def is_text(value: object) -> bool:
    """Return whether a value is text that has a UTF-8 form and is not blank."""
    if not isinstance(value, str) or not value.strip():
        return False
    return not any("\ud800" <= char <= "\udfff" for char in value)


def is_any_text(value: object) -> bool:
    """Return whether a value is text that has a UTF-8 form, maybe empty."""
    return value == "" or is_text(value) or (isinstance(value, str) and value.isspace())


def is_texts(value: object) -> bool:
    """Return whether a value is a list of texts, not empty."""
    return isinstance(value, list) and bool(value) and all(map(is_text, value))


def is_number(value: object) -> bool:
    """Return whether a value is an integer."""
    return isinstance(value, int) and not isinstance(value, bool)
