"""Output that grows line by line, survives any end of its process, and gets its name when whole."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO

from paceline.errors import RequestError

_SYNC = 1.0  # seconds between two times that the disk is waited for


class OutputJournal:
    """A job's output so far, `NAME.part`, beside `NAME.job`, which says what job that is.

    A line has the number of the input's line that it answers; numbers ascend. Begun again with the
    same job it goes on after the last whole line.

    Args:
        path: where the output is to be.
        job: what the lines depend on.

    Attributes:
        done: number of the last line that is there; 0 before the first.
        lines: that are there.
        failed: lines among them with an error.

    Raises:
        RequestError: the output exists, another process writes it, or what is there is another's.
    """

    def __init__(self, path: Path, job: dict[str, Any]) -> None:
        self.path, self.done, self.lines, self.failed = path, 0, 0, 0
        self._part = path.with_name(f"{path.name}.part")
        self._job = path.with_name(f"{path.name}.job")
        self._file = self._part.open("a+b")
        try:
            self._begin(job)
        except BaseException:
            self._file.close()
            raise
        self._synced = monotonic()

    def _begin(self, job: dict[str, Any]) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RequestError(f"another process is writing {self.path}") from None
        if self.path.exists():
            if not self._part.stat().st_size:
                self._part.unlink()
            raise RequestError(f"{self.path} exists already; remove it, or name another output")
        if self._part.stat().st_size:
            self._check(job)
        else:
            _write(self._job, job)
        self._file.seek(0)
        whole = 0
        for line, number, failed in _whole(self._file, self.done):
            self.done, whole = number, whole + len(line)
            self.lines, self.failed = self.lines + 1, self.failed + failed
        self._file.truncate(whole)

    def _check(self, job: dict[str, Any]) -> None:
        try:
            found = json.loads(self._job.read_bytes())
        except (OSError, ValueError):
            found = None
        if found != job:
            known = found if isinstance(found, dict) else {}
            other = [key for key in job if known.get(key) != job[key]]
            raise RequestError(
                f"{self._part} is of a job with another {' and '.join(other) or 'setting'}; remove "
                "it to begin anew, or ask for the same to go on"
            )

    def add(self, number: int, line: dict[str, Any]) -> None:
        """Write the next line, at once.

        Args:
            number: of the input's line, above `done`.
            line: with `error`, None where there is none.
        """
        text = json.dumps({"id": _name(number), **line})
        self._file.write(text.encode() + b"\n")
        self._file.flush()
        self.done, self.lines = number, self.lines + 1
        self.failed += line["error"] is not None
        if monotonic() - self._synced > _SYNC:
            os.fsync(self._file.fileno())
            self._synced = monotonic()

    def finish(self) -> None:
        """Give the output its name; nothing can be added any more."""
        os.fsync(self._file.fileno())
        self._part.replace(self.path)
        self._job.unlink(missing_ok=True)
        self._file.close()

    def close(self) -> None:
        """Leave what is there for another time; nothing where there is nothing."""
        if not self._file.closed and not self.lines:
            self._part.unlink()
            self._job.unlink(missing_ok=True)
        self._file.close()


def _name(number: int) -> str:
    return f"batch_req_{number}"


def _whole(file: BinaryIO, done: int) -> Iterator[tuple[bytes, int, bool]]:
    """The lines before the first that is not whole: each with its number, and whether it failed."""
    for line in file:
        try:
            found = json.loads(line)
            number = int(found["id"].removeprefix(_name(0)[:-1]))
            failed = found["error"] is not None
        except (ValueError, LookupError, TypeError, AttributeError):
            return
        if not line.endswith(b"\n") or number <= done:
            return
        done = number
        yield line, number, failed


def _write(path: Path, job: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(job, file)
        file.flush()
        os.fsync(file.fileno())
