"""Results of items on disk, so that an interrupted evaluation goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

import paceline
from paceline import _native
from paceline.engines.ensemble import EnsembleEngine
from paceline.lm import LM
from paceline.measuring.evaluation.base import Result

_SECONDS = 5.0  # between two writes, at least; and ten times what a write takes


class ItemCache:
    """Results of one suite by one model, kept in one file that is replaced as a whole.

    Args:
        folder: of the file, made when it is first written; None keeps nothing.
        identity: all that results depend on besides the items, as JSON can hold it.
        is_sound: tells results that can be used; items of others are scored again.
        fresh: begin without what the file holds.

    A folder that cannot be written is no error: an interrupted run then begins anew.
    """

    def __init__(
        self,
        folder: Path | None,
        identity: object,
        is_sound: Callable[[object], bool],
        fresh: bool = False,
    ) -> None:
        self._is_sound = is_sound
        self._results: dict[str, Result] = {}
        self._changed, self._next = False, monotonic() + _SECONDS
        self._path: Path | None = None
        if folder is not None:
            name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
            self._path = folder / f"{name}.json"
            self._results = {} if fresh else self._read(self._path)

    def _read(self, path: Path) -> dict[str, Result]:
        with suppress(OSError, ValueError, RecursionError):
            content: Any = json.loads(path.read_bytes())
            if isinstance(content, dict):
                return {key: value for key, value in content.items() if self._is_sound(value)}
        return {}

    def get(self, key: str) -> Result | None:
        """Return the result of an item, or None."""
        return self._results.get(key)

    def put(self, key: str, result: Result) -> None:
        """Keep the result of an item; it is written within seconds."""
        self._results[key] = result
        self._changed = True
        if monotonic() >= self._next:
            self.flush()

    def flush(self) -> None:
        """Write what was not written: under another name first, then in place of the file."""
        if self._path is None or not self._changed:
            return
        start = monotonic()
        part = self._path.with_name(f".{self._path.name}.{os.getpid()}.part")
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                part.write_text(json.dumps(self._results), encoding="utf-8")
                part.replace(self._path)
                self._changed = False
            finally:
                part.unlink(missing_ok=True)
        self._next = monotonic() + max(_SECONDS, 10 * (monotonic() - start))


def model_identity(lm: LM) -> list[Any] | None:
    """Return what tells a model's scores from those of another; None for an ensemble."""
    engine = lm.engine
    if isinstance(engine, EnsembleEngine):
        return None
    code = hashlib.sha256(Path(_native.__file__).read_bytes()).hexdigest()
    facts = (engine.name, engine.format, engine.kv_format, engine.device, repr(engine.pattern))
    policy = repr(lm.request_builder.kv_policy)
    return [paceline.__version__, code, lm.model.digest(), *facts, repr(engine.config), policy]
