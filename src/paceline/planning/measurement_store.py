"""Measurements of plans, kept by machine, model and version in the cache folder.

Every measurement is one file that is written under another name first, so that a plan that is
killed goes on where it was, and two plans at once read each other's results. Only one process
measures at a time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from paceline import __version__
from paceline.cache_dir import cache_folder, cached_json
from paceline.machine import machine

T = TypeVar("T")
_FACTS = ("processor", "architecture", "usable_cores", "instruction_sets")


def plans_folder() -> Path:
    """Return the folder of plans and their measurements."""
    return cache_folder() / "plans"


def machine_facts() -> dict[str, Any]:
    """Return what identifies a machine to a plan."""
    here = machine()
    facts = {name: here[name] for name in _FACTS if here[name] is not None}
    if here["memory_bytes"]:  # what the system keeps for itself differs from start to start
        facts["memory_gib"] = round(here["memory_bytes"] / 2**30)
    return facts


def short_hash(value: object) -> str:
    """Return a hash of a value's JSON."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


class MeasurementStore:
    """The measurements of one model on this machine.

    Args:
        fingerprint: of the model.
        folder: where stores are; None takes the cache folder.
        say: is given a line for the user.
    """

    def __init__(
        self,
        fingerprint: str,
        folder: Path | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        root = plans_folder() if folder is None else folder
        self.folder = root / short_hash([__version__, machine_facts(), fingerprint])
        self._lock = root / ".measuring"
        self._say = say

    def path(self, name: str, key: Sequence[object]) -> Path:
        """Return the file of a measurement."""
        return self.folder / f"{name}-{short_hash(key)}.json"

    def known(self, name: str, key: Sequence[object], parse: Callable[[Any], T]) -> T | None:
        """Return a measurement that was made before; None where there is none, or a damaged one.

        Args:
            name: kind of the measurement.
            key: tells measurements of a kind apart.
            parse: turns its document into a value, and raises ValueError, KeyError or TypeError.
        """
        try:
            return parse(json.loads(self.path(name, key).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def measured(
        self,
        name: str,
        key: Sequence[object],
        parse: Callable[[Any], T],
        make: Callable[[], object],
    ) -> T:
        """Return a measurement, made now unless it is known; one process measures at a time."""
        known = self.known(name, key, parse)
        if known is not None:
            return known
        with self.alone():
            known = self.known(name, key, parse)  # by whoever measured meanwhile
            if known is not None:
                return known
            return cached_json(name, short_hash(key), make, parse, self.folder, renew=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock of measurements on this machine, where files can be locked.

        It must not be entered twice.
        """
        try:
            self._lock.parent.mkdir(parents=True, exist_ok=True)
            lock = self._lock.open("w")
        except OSError:  # a folder that cannot be written: nothing is shared then
            yield
            return
        with lock:
            with suppress(OSError):
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self._say("another plan measures on this machine; waiting for it")
                    fcntl.flock(lock, fcntl.LOCK_EX)
            yield
