"""Write GGUF files, version 3: metadata, then tensors one after the other, in pieces.

Memory peaks at one piece of a tensor. The layout is that of `gguf.py`.
"""

from __future__ import annotations

import math
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from paceline.errors import ModelError
from paceline.models.formats.gguf_types import TYPES
from paceline.models.formats.writer import replace_file

Value = (
    bool | int | float | str | np.generic | NDArray[Any] | Sequence[str | bytes] | Sequence[float]
)

ALIGNMENT = 32  # bytes; the default of readers
_STRING, _ARRAY, _BOOL = 8, 9, 7
_CODES = {
    np.dtype(kind): code
    for code, kind in enumerate(("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4"))
} | {np.dtype(bool): _BOOL, np.dtype("<u8"): 10, np.dtype("<i8"): 11, np.dtype("<f8"): 12}


@dataclass(frozen=True)
class PendingTensor:
    """A tensor whose bytes are made while it is written.

    Attributes:
        type: a name of `gguf_types.TYPES`.
        shape: in NumPy's order, [out, in].
        pieces: yields the bytes of consecutive rows, uint8 [rows, row bytes].
    """

    type: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[NDArray[np.uint8]]]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return math.prod(self.shape[:-1]) * TYPES[self.type].row_bytes(self.shape[-1])


def write_gguf(
    path: Path,
    metadata: Mapping[str, Value],
    tensors: Mapping[str, PendingTensor],
    tick: Callable[[int], None] | None = None,
) -> int:
    """Write a file; it gets its name once it is complete.

    Args:
        path: of the file; an existing one is replaced.
        metadata: key -> value. Whole numbers are u32 where they fit, i32 or i64 otherwise, and i32
            in lists; others are float32. A NumPy number or array keeps its type.
        tensors: by name, in the order of the file.
        tick: called with the number of bytes after each piece.

    Returns:
        bytes of the file.

    Raises:
        ModelError: it cannot be written, or a tensor yields other bytes than its shape has.
    """
    head = _header(metadata, tensors)
    size = len(head) + sum(_aligned(tensor.nbytes) for tensor in tensors.values())
    check_space(path, size)

    def write(file: BinaryIO) -> None:
        file.write(head)
        for name, tensor in tensors.items():
            _write_tensor(file, name, tensor, tick)

    replace_file(path, write)
    return size


def check_space(path: Path, size: int) -> None:
    """Refuse to begin a file that the disk has no room for.

    Raises:
        ModelError: the disk has less than `size` bytes free.
    """
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ModelError(
            f"cannot write {path}: it will have {size / 1e6:.0f} MB and the disk has "
            f"{free / 1e6:.0f} MB left; free some, or choose a smaller format"
        )


def _write_tensor(
    file: BinaryIO, name: str, tensor: PendingTensor, tick: Callable[[int], None] | None
) -> None:
    written = 0
    for piece in tensor.pieces():
        file.write(np.ascontiguousarray(piece).data)
        written += piece.nbytes
        if tick:
            tick(piece.nbytes)
    if written != tensor.nbytes:
        raise ModelError(f"tensor {name} has {written} bytes, expected {tensor.nbytes}")
    file.write(bytes(_aligned(written) - written))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _header(metadata: Mapping[str, Value], tensors: Mapping[str, PendingTensor]) -> bytes:
    """Return everything before the data, padded to the alignment."""
    parts = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))]
    parts += [_text(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    for name, tensor in tensors.items():
        axes = len(tensor.shape)
        parts += [_text(name), struct.pack(f"<I{axes}Q", axes, *reversed(tensor.shape))]
        parts.append(struct.pack("<IQ", TYPES[tensor.type].id, offset))
        offset += _aligned(tensor.nbytes)
    head = b"".join(parts)
    return head.ljust(_aligned(len(head)), b"\0")


def _text(text: str | bytes) -> bytes:
    content = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(content)) + content


def _value(value: Value) -> bytes:
    """Return the type and the bytes of a value."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, bool | int | float | np.generic):
        number = _number(value)
        return struct.pack("<I", _CODES[number.dtype]) + number.tobytes()
    if not isinstance(value, np.ndarray):
        if all(isinstance(item, str | bytes) for item in value):
            strings = b"".join(_text(item) for item in value)  # type: ignore[arg-type]
            return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + strings
        whole = all(isinstance(item, int) for item in value)
        value = np.array(value, "<i4" if whole else "<f4")
    code = _CODES[value.dtype.newbyteorder("<")]
    return (
        struct.pack("<IIQ", _ARRAY, code, len(value))
        + value.astype(value.dtype.newbyteorder("<")).tobytes()
    )


def _number(value: bool | int | float | np.generic) -> NDArray[Any]:
    if isinstance(value, np.generic):
        return np.asarray(value).astype(value.dtype.newbyteorder("<"))
    if isinstance(value, bool):
        return np.asarray(value)
    if isinstance(value, int):
        small = 0 <= value < 1 << 32
        return np.asarray(value, "<u4" if small else "<i4" if -(1 << 31) <= value < 0 else "<i8")
    return np.asarray(value, "<f4")
