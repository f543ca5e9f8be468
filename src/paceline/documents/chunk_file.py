"""Binary format of one stored chunk.

A file is, with numbers in little-endian order:

| bytes | content |
|---|---|
| 8 | `PCLCHNK` and a zero byte |
| 4 | version of the format, now 1 |
| 4 | tokens of the sink |
| 32 | identity: SHA-256 of the model, its formats and the code that computed the chunk |
| 32 | key: SHA-256 of the ids of sink and document |
| 8 | number N of bytes of the arrays |
| N | the arrays in the safetensors format: `keys.I`, `values.I` and `queries.I` of layer I |
| 32 | SHA-256 of everything before |

Nothing in a file is executed or unpickled.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Sequence

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from paceline.documents.chunk import Chunk
from paceline.engines.page_file import DamagedPageError, ForeignPageError

MAGIC = b"PCLCHNK\0"
VERSION = 1
_HEAD = struct.Struct("<8sII32s32sQ")
_CHECKSUM = 32
_NAME = re.compile(r"(keys|values|queries)\.(\d+)")


def chunk_key(sink: Sequence[int], tokens: Sequence[int]) -> bytes:
    """Return 32 bytes that stand for a document behind a sink."""
    ids = np.array([len(sink), *sink, *tokens], "<i8").tobytes()
    return hashlib.sha256(b"paceline chunk " + ids).digest()


def encode(identity: bytes, key: bytes, chunk: Chunk) -> list[bytes]:
    """Return the parts of a file, to be written one after the other."""
    arrays = {f"keys.{index}": each for index, each in enumerate(chunk.keys)}
    arrays |= {f"values.{index}": each for index, each in enumerate(chunk.values)}
    arrays |= {f"queries.{index}": each for index, each in chunk.queries.items()}
    body = save(arrays)
    parts = [_HEAD.pack(MAGIC, VERSION, chunk.start, identity, key, len(body)), body]
    checksum = hashlib.sha256()
    for part in parts:
        checksum.update(part)
    return [*parts, checksum.digest()]


def decode(data: bytes, identity: bytes, key: bytes) -> Chunk:
    """Return the chunk of a file.

    Args:
        data: the whole file.
        identity: expected.
        key: expected.

    Raises:
        ForeignPageError: the file is no chunk, or of another version.
        DamagedPageError: it is cut, changed, or a chunk of something else.
    """
    if len(data) < _HEAD.size + _CHECKSUM:
        raise DamagedPageError(f"it has {len(data)} bytes, less than a head")
    magic, version, start, *rest = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise ForeignPageError("it is no chunk of keys and values")
    if version > VERSION:
        raise ForeignPageError(f"its format is version {version}, and {VERSION} is known here")
    view = memoryview(data)
    if hashlib.sha256(view[:-_CHECKSUM]).digest() != data[-_CHECKSUM:]:
        raise DamagedPageError("its checksum is wrong")
    if version != VERSION or rest != [identity, key, len(data) - _HEAD.size - _CHECKSUM]:
        raise DamagedPageError("it is a chunk of another text or model")
    try:
        arrays = load(data[_HEAD.size : -_CHECKSUM])
    except (SafetensorError, ValueError) as error:
        raise DamagedPageError(f"its arrays cannot be read: {error!s:.80}") from None
    return _chunk(start, arrays)


def _chunk(start: int, arrays: dict[str, np.ndarray]) -> Chunk:
    kinds: dict[str, dict[int, np.ndarray]] = {"keys": {}, "values": {}, "queries": {}}
    for name, array in arrays.items():
        match = _NAME.fullmatch(name)
        if match is None or array.ndim != 3:
            raise DamagedPageError(f"it holds an array {name!r:.40} that no chunk has")
        kinds[match[1]][int(match[2])] = array
    layers = range(len(kinds["keys"]))
    if not layers or set(kinds["keys"]) != set(layers) or set(kinds["values"]) != set(layers):
        raise DamagedPageError("keys or values of a layer are missing")
    return Chunk(
        start,
        tuple(kinds["keys"][index] for index in layers),
        tuple(kinds["values"][index] for index in layers),
        dict(sorted(kinds["queries"].items())),
    )
