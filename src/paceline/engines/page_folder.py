"""A folder of stored pages, which several processes may share."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
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
from paceline.engines.shared_folder import (
    StoredFile,
    locked,
    read_content,
    stored_files,
    write_file,
)
from paceline.errors import RequestError

_log = logging.getLogger(__name__)
_SUFFIX = ".page"
_MODEL = re.compile(r"v\d+-[0-9a-f]{16}")
_PAGE = re.compile(r"[0-9a-f]{48}\.page")


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
        write_file(path, encode(self.identity, link.before, link.tokens, page))
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

    def locked(self) -> AbstractContextManager[None]:
        """Hold the lock of the folder; see `shared_folder.locked`."""
        return locked(self.root, self.own)


def stored_pages(root: Path) -> list[StoredFile]:
    """Return the stored pages of all models in a folder, and remove what dead writers left."""
    return stored_files(root, _MODEL, _PAGE)
