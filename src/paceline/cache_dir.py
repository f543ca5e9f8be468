"""The user's cache folder, and small JSON documents that are kept there between runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from paceline.errors import PacelineError

T = TypeVar("T")


def cache_folder() -> Path:
    """Return `paceline` in `XDG_CACHE_HOME`, which is `~/.cache` unless set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paceline"


def cached_json(
    name: str,
    key: str,
    make: Callable[[], object],
    parse: Callable[[Any], T],
    folder: Path | None = None,
    renew: bool = False,
) -> T:
    """Return a value that is computed once and kept as `NAME-KEY.json`.

    Args:
        name: what the value is.
        key: tells values of the same name apart.
        make: computes the document; called if the file is missing or damaged.
        parse: turns a document into the value; raises ValueError, KeyError, TypeError or
            PacelineError for a damaged one.
        folder: where the file is; None takes `cache_folder()`. A folder that cannot be written is
            no error: the value is computed again next time.
        renew: compute the value in any case.
    """
    path = (folder or cache_folder()) / f"{name}-{key}.json"
    with suppress(OSError, ValueError, KeyError, TypeError, PacelineError):
        if not renew:
            return parse(json.loads(path.read_text()))
    document = make()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")  # of this process alone
        part.write_text(json.dumps(document, indent=2) + "\n")
        part.replace(path)
    return parse(document)
