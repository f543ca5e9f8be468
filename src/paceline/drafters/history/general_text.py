"""General text that every machine with Python has: documentation and code, read and never run.

It stays on the machine that it was read from, so that no licence is touched.
"""

from __future__ import annotations

import importlib
import os
import sysconfig
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

_LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
)
_LONGEST = 1 << 20  # bytes of a document; longer ones are tables


def general_texts() -> Iterator[str]:
    """Yield documents, prose before code, in an order that depends on names alone.

    The language reference of the running Python, the descriptions of installed packages, and the
    modules of the standard library, tests left out.
    """
    topics = importlib.import_module("pydoc_data.topics").topics
    yield from (topics[name] for name in sorted(topics))
    yield from descriptions()
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(_modules(library)):
        text = _source(path)
        if text:
            yield text


def descriptions() -> list[str]:
    """Return what installed packages say of themselves, in the order of their names."""
    found: dict[str, str] = {}
    for each in distributions():
        about = each.metadata
        name, text = about["Name"], about.get_payload()  # type: ignore[attr-defined]
        if isinstance(name, str) and isinstance(text, str) and 0 < len(text) <= _LONGEST:
            found[name.lower()] = text
    return [found[name] for name in sorted(found)]


def _modules(library: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(library):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _source(path: Path) -> str:
    """Return a module's text; empty where it cannot be read or is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8") if path.stat().st_size <= _LONGEST else ""
    except (OSError, UnicodeDecodeError):
        return ""
