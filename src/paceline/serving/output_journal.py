"""An output file that grows line by line and survives a crash of its process at any time."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO

from paceline.errors import RequestError

_SYNC = 1.0  # seconds between calls of fsync


class OutputJournal:
    """The unfinished output of a batch, `NAME.part`, next to `NAME.job`, which describes the batch.

    Each line has the number of the input line that it answers; numbers ascend. Reopened with the
    same description it continues after the last complete line.

    Args:
        path: of the finished output.
        job: everything the lines depend on, as JSON.

    Attributes:
        done: number of the last line written; 0 before the first.
        lines: number of lines written.
        failed: number of these that have an error.

    Raises:
        RequestError: the output exists, another process is writing it, or the unfinished output
            belongs to another batch.
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
            raise RequestError(f"{self.path} exists; remove it, or name another output")
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
            description = json.loads(self._job.read_bytes())
        except (OSError, ValueError):
            description = None
        if description != job:
            known = description if isinstance(description, dict) else {}
            other = [key for key in job if known.get(key) != job[key]]
            raise RequestError(
                f"{self._part} belongs to a batch with another {' and '.join(other) or 'setting'}; "
                "remove it to start over, or repeat the former command to continue"
            )

    def add(self, number: int, line: dict[str, Any]) -> None:
        """Write the next line, at once.

        Args:
            number: of the input line, above `done`.
            line: with an `error`, None where there is none.
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
        """Rename the output to its final name; nothing can be added any more."""
        os.fsync(self._file.fileno())
        self._part.replace(self.path)
        self._job.unlink(missing_ok=True)
        self._file.close()

    def close(self) -> None:
        """Close the file and keep it for a later run; delete it if it has no line."""
        if not self._file.closed and not self.lines:
            self._part.unlink()
            self._job.unlink(missing_ok=True)
        self._file.close()


def _name(number: int) -> str:
    return f"batch_req_{number}"


def _whole(file: BinaryIO, done: int) -> Iterator[tuple[bytes, int, bool]]:
    """Yield the complete lines from the start, with their numbers and whether they failed."""
    for line in file:
        try:
            row = json.loads(line)
            number = int(row["id"].removeprefix(_name(0)[:-1]))
            failed = row["error"] is not None
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
