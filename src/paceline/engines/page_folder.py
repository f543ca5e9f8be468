"""A folder of stored pages, which several processes may share."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from paceline.core import Tokens
from paceline.engines.page_file import (
    VERSION,
    DamagedPageError,
    ForeignPageError,
    decode,
    encode,
    file_size,
    first_key,
    next_key,
)
from paceline.engines.pages import PAGE
from paceline.errors import RequestError

_log = logging.getLogger(__name__)
_SUFFIX = ".page"
_MODEL = re.compile(r"v\d+-[0-9a-f]{16}")
_PAGE = re.compile(r"[0-9a-f]{48}\.page")
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


class Link(NamedTuple):
    """A page of a text: its tokens [PAGE], the key before it and its own."""

    tokens: Tokens
    before: bytes
    key: bytes


@dataclass(eq=False)
class PageFolder:
    """Pages of one model among those of others.

    The pages of a model lie in a sub-folder that is named by the version of the format and the
    model's identity. A page is written to a file of its own under another name and renamed, so that
    a reader never sees half of it. Writers and whoever evicts hold a lock on the whole folder.

    Args:
        root: the folder; made if it is missing, for its owner alone.
        identity: 32 bytes that tell the model, its formats and the code from all others.
        limit: maximum bytes of all files of all models.

    Attributes:
        unusable: files that were damaged, foreign or unreadable, whenever one was to be read.

    Raises:
        RequestError: the folder cannot be used.
    """

    root: Path
    identity: bytes
    limit: int
    unusable: int = field(default=0, init=False)
    _ignored: set[Path] = field(default_factory=set, init=False)  # named in the log already

    def __post_init__(self) -> None:
        try:
            self.own.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self.locked():
                pass
            next(self.own.iterdir(), None)
        except OSError as error:
            raise RequestError(
                f"the folder {self.root} cannot hold a prefix cache: {error.strerror or error}; "
                "name one that can be written"
            ) from None

    @property
    def own(self) -> Path:
        """Sub-folder of this model."""
        return self.root / f"v{VERSION}-{self.identity.hex()[:16]}"

    def links(self, tokens: Tokens) -> Iterator[Link]:
        """Yield the full pages of a text [S]."""
        key = first_key(self.identity)
        for start in range(0, len(tokens) - PAGE + 1, PAGE):
            part = np.array(tokens[start : start + PAGE], np.int32)
            before, key = key, next_key(key, part)
            yield Link(part, before, key)

    def path(self, link: Link) -> Path:
        """Return where a page is stored."""
        return self.own / (link.key.hex()[:48] + _SUFFIX)

    def holds(self, link: Link) -> bool:
        """Return whether there is a file for a page; it may be damaged."""
        return self.path(link).exists()

    def read(self, link: Link, page_bytes: int) -> NDArray[np.uint8] | None:
        """Return a page, uint8 [page_bytes], or None if there is none that can be used.

        A damaged file is removed, with one line in the log; one that others wrote is left alone.
        """
        path = self.path(link)
        try:
            content = read_content(path, file_size(page_bytes) + 1)
            page = decode(content, self.identity, link.before, link.tokens)
            if len(page) != page_bytes:
                raise DamagedPageError(f"its page has {len(page)} bytes, expected {page_bytes}")
        except FileNotFoundError:  # evicted meanwhile
            return None
        except DamagedPageError as error:
            self.unusable += 1
            _log.warning("removed %s from the prefix cache: %s", path, error)
            with suppress(OSError):
                path.unlink()
            return None
        except (OSError, ForeignPageError) as error:
            self.unusable += 1
            reason = error.strerror if isinstance(error, OSError) else error
            if path not in self._ignored:
                _log.warning("ignored %s in the prefix cache: %s", path, reason)
            self._ignored.add(path)
            return None
        return page

    def write(self, link: Link, page: NDArray[np.uint8]) -> int:
        """Write a page, and return the size of the file. Call it while `locked`.

        Raises:
            OSError: it cannot be written; nothing is left.
        """
        path = self.path(link)
        part = path.with_name(f".{path.stem}.{os.getpid()}.{next(_names)}.part")
        try:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.writelines(encode(self.identity, link.before, link.tokens, page))
            part.replace(path)
        except BaseException:
            with suppress(OSError):
                part.unlink()
            raise
        return path.stat().st_size

    def touch(self, links: Sequence[Link]) -> None:
        """Mark the pages of a text as used now, later ones a little earlier.

        So the least recently used page of a text is its last one, and no page is left without those
        before it.
        """
        now = time.time_ns()
        for place, link in enumerate(links):
            with suppress(OSError):
                os.utime(self.path(link), ns=(now - 1000 * place, now - 1000 * place))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the folder, where its file system has locks.

        Raises:
            OSError: the folder cannot be written.
        """
        self.own.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(self.root / ".lock", flags, 0o600)
        try:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def stored_files(root: Path) -> list[StoredFile]:
    """Return the stored pages of all models in a folder, and remove what dead writers left."""
    found = list[StoredFile]()
    for model in list_entries(root):
        if not _MODEL.fullmatch(model.name) or not model.is_dir(follow_symlinks=False):
            continue
        for entry in list_entries(model.path):
            with suppress(OSError):
                if not entry.is_file(follow_symlinks=False):
                    continue
                state = entry.stat(follow_symlinks=False)
                if _PAGE.fullmatch(entry.name):
                    found.append(StoredFile(state.st_mtime_ns, state.st_size, Path(entry.path)))
                elif _PART.fullmatch(entry.name) and state.st_mtime < time.time() - _STALE:
                    Path(entry.path).unlink()
    return found


def list_entries(folder: Path | str) -> list[os.DirEntry[str]]:
    """Return what is in a folder; nothing if it cannot be read."""
    with suppress(OSError), os.scandir(folder) as entries:
        return list(entries)
    return []


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
