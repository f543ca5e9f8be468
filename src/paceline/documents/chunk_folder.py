"""A folder of stored chunks, which several processes and models may share."""

from __future__ import annotations

import logging
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from paceline.documents.chunk import Chunk
from paceline.documents.chunk_file import VERSION, decode, encode
from paceline.engines.page_file import DamagedPageError, ForeignPageError
from paceline.engines.shared_folder import (
    StoredFile,
    locked,
    read_content,
    stored_files,
    write_file,
)
from paceline.errors import RequestError

_log = logging.getLogger(__name__)
_MODEL = re.compile(r"chunks-v\d+-[0-9a-f]{16}")
_CHUNK = re.compile(r"[0-9a-f]{48}\.chunk")
_LARGEST = 1 << 34  # bytes of a file that is read at all


@dataclass(eq=False)
class ChunkFolder:
    """Chunks of one model among those of others.

    A chunk is written under another name and renamed, so that a reader never sees half of it.

    Args:
        root: the folder; made if it is missing, for its owner alone.
        identity: 32 bytes that tell the model, its formats and the code from all others.
        limit: maximum bytes of all chunks of all models; the least recently used are removed.

    Attributes:
        unusable: files that were damaged, foreign or unreadable when they were read.
        evicted: files that were removed to keep the limit.
        stored_bytes: size of all chunks when the folder was last written.

    Raises:
        RequestError: the folder cannot be used.
    """

    root: Path
    identity: bytes
    limit: int
    unusable: int = field(default=0, init=False)
    evicted: int = field(default=0, init=False)
    stored_bytes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        try:
            with locked(self.root, self.own):
                pass
            self.stored_bytes = sum(each.size for each in stored_chunks(self.root))
        except OSError as error:
            raise RequestError(
                f"the folder {self.root} cannot hold a chunk cache: {error.strerror or error}; "
                "name one that can be written"
            ) from None

    @property
    def own(self) -> Path:
        """Sub-folder of this model."""
        return self.root / f"chunks-v{VERSION}-{self.identity.hex()[:16]}"

    def path(self, key: bytes) -> Path:
        """Return where a chunk is stored."""
        return self.own / f"{key.hex()[:48]}.chunk"

    def read(self, key: bytes) -> Chunk | None:
        """Return a chunk, or None if there is none that can be used.

        A damaged file is removed, with one line in the log; a foreign one is left alone.
        """
        path = self.path(key)
        try:
            chunk = decode(read_content(path, _LARGEST), self.identity, key)
            with suppress(OSError):
                os.utime(path)
        except FileNotFoundError:
            return None
        except DamagedPageError as error:
            self.unusable += 1
            _log.warning("removed %s from the chunk cache: %s", path, error)
            with suppress(OSError):
                path.unlink()
            return None
        except (OSError, ForeignPageError) as error:
            self.unusable += 1
            reason = error.strerror if isinstance(error, OSError) else error
            _log.warning("ignored %s in the chunk cache: %s", path, reason)
            return None
        return chunk

    def write(self, key: bytes, chunk: Chunk) -> bool:
        """Write a chunk unless there is one; remove others for it. Return whether it was written.

        Raises:
            OSError: it cannot be written; nothing is left.
        """
        path = self.path(key)
        parts = encode(self.identity, key, chunk)
        size = sum(map(len, parts))
        if path.exists() or size > self.limit:
            return False
        with locked(self.root, self.own):
            files = sorted(stored_chunks(self.root))
            total = sum(each.size for each in files) + size
            for oldest in files:
                if total <= self.limit:
                    break
                oldest.path.unlink(missing_ok=True)
                total, self.evicted = total - oldest.size, self.evicted + 1
            write_file(path, parts)
            self.stored_bytes = total
        return True


def stored_chunks(root: Path) -> list[StoredFile]:
    """Return the stored chunks of all models in a folder, and remove what dead writers left."""
    return stored_files(root, _MODEL, _CHUNK)
