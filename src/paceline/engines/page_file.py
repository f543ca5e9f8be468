"""Binary format of one stored page of keys and values.

A file is, with numbers in little-endian order:

| bytes | content |
|---|---|
| 8 | `PCLPAGE` and a zero byte |
| 4 | version of the format, now 1 |
| 4 | number of tokens, `PAGE` |
| 32 | identity: SHA-256 of the model, its formats and the code that computed the page |
| 32 | key of the page before it; for the first page that of the identity |
| 8 | number N of the bytes of the page |
| 4 each | ids of the tokens |
| N | keys and values as the engine holds them |
| 32 | SHA-256 of everything before |

A page's key is SHA-256 of the key before it and of the ids, so that it stands for the whole text up
to the end of the page. Nothing in a file is executed or unpickled.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np
from numpy.typing import NDArray

from paceline.core import Tokens
from paceline.engines.pages import PAGE

MAGIC = b"PCLPAGE\0"
VERSION = 1
_HEAD = struct.Struct("<8sII32s32sQ")
_CHECKSUM = 32
_IDS = np.dtype("<i4")


class DamagedPageError(Exception):
    """A file that this version wrote, or should have, does not hold what it must."""


class ForeignPageError(Exception):
    """A file that is no page, or one of a later version of the format."""


def first_key(identity: bytes) -> bytes:
    """Return the key that the first page of every text follows."""
    return hashlib.sha256(b"paceline pages " + identity).digest()


def next_key(key: bytes, tokens: Tokens) -> bytes:
    """Return the key of the page of `tokens` [PAGE] that follows the page `key`."""
    return hashlib.sha256(key + tokens.astype(_IDS).tobytes()).digest()


def file_size(page_bytes: int) -> int:
    """Return the size of a file with a page of `page_bytes` bytes."""
    return _HEAD.size + PAGE * _IDS.itemsize + page_bytes + _CHECKSUM


def encode(identity: bytes, before: bytes, tokens: Tokens, page: NDArray[np.uint8]) -> list[bytes]:
    """Return the parts of a file, to be written one after the other.

    Args:
        identity: 32 bytes.
        before: key of the page before.
        tokens: int32 [PAGE].
        page: uint8 [N].
    """
    head = _HEAD.pack(MAGIC, VERSION, len(tokens), identity, before, len(page))
    parts = [head + tokens.astype(_IDS).tobytes(), page.tobytes()]
    checksum = hashlib.sha256()
    for part in parts:
        checksum.update(part)
    return [*parts, checksum.digest()]


def decode(data: bytes, identity: bytes, before: bytes, tokens: Tokens) -> NDArray[np.uint8]:
    """Return the page of a file, uint8 [N], a read-only view of `data`.

    Args:
        data: the whole file.
        identity: expected.
        before: expected key of the page before.
        tokens: expected, int32 [PAGE].

    Raises:
        ForeignPageError: the file is no page, or of another version.
        DamagedPageError: it is cut, changed, or a page of something else.
    """
    start = _HEAD.size + PAGE * _IDS.itemsize
    if len(data) < _HEAD.size:
        raise DamagedPageError(f"it has {len(data)} bytes, less than a head")
    magic, version, *rest = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise ForeignPageError("it is no page of keys and values")
    if version > VERSION:
        raise ForeignPageError(f"its format is version {version}, and {VERSION} is known here")
    if (
        len(data) < start + _CHECKSUM
        or hashlib.sha256(data[:-_CHECKSUM]).digest() != data[-_CHECKSUM:]
    ):
        raise DamagedPageError("its checksum is wrong")
    expected = [PAGE, identity, before, len(data) - start - _CHECKSUM]
    ids = data[_HEAD.size : start]
    if version != VERSION or rest != expected or ids != tokens.astype(_IDS).tobytes():
        raise DamagedPageError("it is a page of another text or model")
    return np.frombuffer(data, np.uint8, offset=start)[:-_CHECKSUM]
