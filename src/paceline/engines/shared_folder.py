"""Files in a folder that several processes and models share: whole, locked, the oldest known.

A model has a sub-folder of its own. Files are written under another name and renamed, so that a
reader never sees half of one.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import NamedTuple

from paceline.engines.page_file import ForeignPageError

_PART = re.compile(r"\.[0-9a-f]{48}\.\d+\.\d+\.part")
_STALE = 3600.0  # seconds after which an unfinished file was left by a process that ended
_names = count()


class StoredFile(NamedTuple):
    """A file of a folder.

    Attributes:
        used: time of its last use, in nanoseconds.
        size: in bytes.
        path: where it is.
    """

    used: int
    size: int
    path: Path


@contextmanager
def locked(root: Path, own: Path) -> Iterator[None]:
    """Hold the lock of a folder, where its file system has locks.

    Args:
        root: the folder; made if it is missing, for its owner alone.
        own: its sub-folder of one model, likewise.

    Raises:
        OSError: the folder cannot be written.
    """
    own.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_file(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file as a whole; its name is 48 hexadecimal digits and a suffix.

    Raises:
        OSError: it cannot be written; nothing is left.
    """
    part = path.with_name(f".{path.stem}.{os.getpid()}.{next(_names)}.part")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(parts)
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def read_content(path: Path, size: int) -> bytes:
    """Return the content of a regular file, at most `size` bytes of it.

    Raises:
        OSError: there is none, or it cannot be read.
        ForeignPageError: it is something else.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ForeignPageError("it is no regular file")
        return file.read(size)


def stored_files(root: Path, models: re.Pattern[str], files: re.Pattern[str]) -> list[StoredFile]:
    """Return the files of all models in a folder, and remove what dead writers left.

    Args:
        root: the folder.
        models: matches the names of the sub-folders of models.
        files: matches the names of files in them.
    """
    found = list[StoredFile]()
    for model in _entries(root):
        if not models.fullmatch(model.name) or not model.is_dir(follow_symlinks=False):
            continue
        for entry in _entries(model.path):
            with suppress(OSError):
                if not entry.is_file(follow_symlinks=False):
                    continue
                state = entry.stat(follow_symlinks=False)
                if files.fullmatch(entry.name):
                    found.append(StoredFile(state.st_mtime_ns, state.st_size, Path(entry.path)))
                elif _PART.fullmatch(entry.name) and state.st_mtime < time.time() - _STALE:
                    Path(entry.path).unlink()
    return found


def _entries(folder: Path | str) -> list[os.DirEntry[str]]:
    """Return what is in a folder; nothing if it cannot be read."""
    with suppress(OSError), os.scandir(folder) as entries:
        return list(entries)
    return []
