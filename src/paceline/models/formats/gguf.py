"""The GGUF container, read in place: metadata as Python values, tensors as views of the file.

Nothing in a file is trusted: counts and lengths are checked against its size before anything is
allocated, so that memory is bounded by a small multiple of the file. Versions 2 and 3 are alike.
All numbers are little-endian. After the magic bytes: version u32, tensors u64, keys u64; each key
as a string (length u64, bytes), a type u32 and a value; each tensor as a name, the number of axes
u32, the sizes u64 (the fastest first), a type u32 and an offset u64 from the start of the data,
which begins at the next multiple of `general.alignment`.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.errors import ModelError
from paceline.models.formats.gguf_types import TYPES, TYPES_BY_ID, BlockType, type_name

Value = str | int | float | bool | NDArray[Any] | list[bytes]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "u1"},
    **{10: "<u8", 11: "<i8", 12: "<f8"},
}
_SMALLEST_KEY = 8 + 4 + 1  # bytes
_SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8
_MOST_AXES = 4
_ALIGNMENT = 32  # bytes, unless `general.alignment` says otherwise
_LARGEST = 2**31 - 1  # of an axis; as everywhere in Paceline
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)

_unpack_length = struct.Struct("<Q").unpack_from


@dataclass(frozen=True, slots=True, eq=False)
class GGUFTensor:
    """A tensor of a file.

    Attributes:
        name: as the file has it, e.g. `blk.0.attn_q.weight`.
        type: name of its type, a key of `gguf_types.TYPES`.
        shape: in NumPy's order: a matrix is [out, in].
        data: uint8 [rows, bytes of a row], a read-only view of the mapped file.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class GGUFFile:
    """A GGUF file, or the parts of a split one.

    Attributes:
        path: the file, or the first part.
        metadata: key -> value: text, numbers (a float32 as the shortest decimal that gives it),
            arrays of numbers as read-only NumPy arrays, arrays of strings as lists of bytes.
        tensors: by name, in the order of the file.
        files: all parts; one without a split.
    """

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GGUFTensor]
    files: tuple[Path, ...]

    @classmethod
    def open(cls, path: Path) -> GGUFFile:
        """Read the metadata of a file and map its tensors.

        Args:
            path: the file, or the first part of a split one; the others lie beside it.

        Raises:
            ModelError: it cannot be read, is truncated or inconsistent, or stores tensors in a
                type that Paceline does not read.
        """
        metadata, tensors = _read(path)
        count = _number(path, metadata, "split.count", 1)
        if count == 1:
            return cls(path, metadata, tensors, (path,))
        files = _parts(path, metadata, count)
        for number, file in enumerate(files[1:], 1):
            own, more = _read(file)
            if (_number(file, own, "split.no", 0), _number(file, own, "split.count", 1)) != (
                number,
                count,
            ):
                raise ModelError(f"{file} is not part {number + 1} of {count}; download it again")
            twice = tensors.keys() & more.keys()
            if twice:
                raise ModelError(f"{file} holds tensor {min(twice)!r:.80} of an earlier part")
            tensors |= more
        expected = _number(path, metadata, "split.tensors.count", len(tensors))
        if expected != len(tensors):
            raise ModelError(
                f"the {count} parts of {path} hold {len(tensors)} tensors, expected {expected}; "
                "download them again"
            )
        return cls(path, metadata, tensors, files)


def is_gguf(path: Path) -> bool:
    """Return whether a file begins as GGUF files do; False where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def part_number(path: Path) -> int:
    """Return the number of a part of a split file by its name, from 1; 0 for other names."""
    match = _PART.fullmatch(path.name)
    return int(match[2]) if match else 0


def _number(path: Path, metadata: Mapping[str, Value], key: str, default: int) -> int:
    value = metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ModelError(f"{key} in {path} is {value!r:.80}, expected a whole number")
    return value


def _parts(path: Path, metadata: Mapping[str, Value], count: int) -> tuple[Path, ...]:
    """Return the paths of all parts, given the first."""
    match = _PART.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise ModelError(
            f"{path} is one of {count} parts, expected a name that ends in "
            f"-00001-of-{count:05}.gguf; rename it as it was published"
        )
    first = path.with_name(f"{match[1]}-00001-of-{match[3]}.gguf")
    if int(match[2]) != 1 or _number(path, metadata, "split.no", 0) != 0:
        raise ModelError(f"{path} is not the first of {count} parts; name {first}")
    files = (path.with_name(f"{match[1]}-{i:05}-of-{match[3]}.gguf") for i in range(1, count + 1))
    found = []
    for file in files:  # one by one: a lying count must not make a long list
        if not file.is_file():
            raise ModelError(f"{path} is one of {count} parts, and {file.name} is not beside it")
        found.append(file)
    return tuple(found)


def _read(path: Path) -> tuple[dict[str, Value], dict[str, GGUFTensor]]:
    """Return the metadata and the tensors of one file."""
    try:
        with path.open("rb") as file:
            start = file.read(24)
            _check_start(path, start)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from None
    return _Header(path, mapped).read()


def _check_start(path: Path, start: bytes) -> None:
    if start[:4] != _MAGIC:
        raise ModelError(
            f"{path} is no GGUF file: it begins with {start[:4]!r}, expected {_MAGIC!r}"
        )
    if len(start) < 24:
        raise ModelError(f"{path} is truncated after {len(start)} bytes; download it again")
    version = int.from_bytes(start[4:8], "little")
    if version and not version & 0xFFFF:
        raise ModelError(
            f"{path} is a big-endian GGUF file; expected a little-endian one, download that"
        )
    if version not in _VERSIONS:
        raise ModelError(
            f"{path} is GGUF version {version}, expected 2 or 3; convert it with a current "
            "llama.cpp"
        )


class _Header:
    """A cursor over the beginning of a mapped file; whatever leaves the file is refused."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self._path = path
        self._mapped = mapped
        self._size = len(mapped)
        self._bytes: NDArray[np.uint8] = np.ndarray(len(mapped), np.uint8, mapped)
        self._at = 8

    def read(self) -> tuple[dict[str, Value], dict[str, GGUFTensor]]:
        """Return the metadata and the tensors."""
        tensors, keys = self._integer(8), self._integer(8)
        self._check_count("tensors", tensors, _SMALLEST_TENSOR)
        self._check_count("keys", keys, _SMALLEST_KEY)
        metadata: dict[str, Value] = {}
        for _ in range(keys):
            key = self._name("key")
            if key in metadata:
                raise self._wrong(f"has the key {key!r:.80} twice")
            metadata[key] = self._value(key)
        infos: dict[str, tuple[BlockType, tuple[int, ...], int]] = {}
        for _ in range(tensors):
            name = self._name("tensor")
            if name in infos:
                raise self._wrong(f"has the tensor {name!r:.80} twice")
            infos[name] = self._tensor(name)
        return metadata, self._place(
            infos, _number(self._path, metadata, "general.alignment", _ALIGNMENT)
        )

    def _wrong(self, what: str) -> ModelError:
        return ModelError(f"{self._path} {what}; it is damaged or truncated, download it again")

    def _take(self, count: int) -> int:
        """Move on by some bytes; return where they begin."""
        start = self._at
        if count > self._size - start:
            raise self._wrong(
                f"has {self._size} bytes and would need {count} more after byte {start}"
            )
        self._at = start + count
        return start

    def _integer(self, nbytes: int) -> int:
        start = self._take(nbytes)
        return int.from_bytes(self._mapped[start : start + nbytes], "little")

    def _check_count(self, what: str, count: int, smallest: int) -> None:
        if count > (self._size - self._at) // smallest:
            raise self._wrong(f"claims {count} {what} in {self._size} bytes")

    def _string(self) -> bytes:
        length = self._integer(8)
        start = self._take(length)
        return self._mapped[start : start + length]

    def _name(self, what: str) -> str:
        raw = self._string()
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self._wrong(f"has the {what} {raw!r:.80}, which is not UTF-8") from None

    def _value(self, key: str) -> Value:
        kind = self._integer(4)
        if kind == _STRING:
            return self._string().decode(errors="replace")
        if kind != _ARRAY:
            value = self._numbers(key, kind, 1)[0]
            return float(str(value)) if value.dtype == np.float32 else value.item()
        kind, count = self._integer(4), self._integer(8)
        if kind == _STRING:
            return self._strings(key, count)
        if kind == _ARRAY:
            raise ModelError(f"{key!r:.80} of {self._path} is an array of arrays, expected numbers")
        return self._numbers(key, kind, count)

    def _numbers(self, key: str, kind: int, count: int) -> NDArray[Any]:
        if kind not in _NUMBERS:
            raise self._wrong(f"gives {key!r:.80} the unknown type {kind}")
        dtype = np.dtype(_NUMBERS[kind])
        start = self._take(count * dtype.itemsize)
        values = self._bytes[start : start + count * dtype.itemsize].view(dtype)
        return values != 0 if kind == _BOOL else values

    def _strings(self, key: str, count: int) -> list[bytes]:
        self._check_count(f"strings in {key!r:.80}", count, 8)
        mapped, at, size = self._mapped, self._at, self._size
        strings = []
        for _ in range(count):  # 260,000 tokens: nothing here but what must be
            if at > size - 8:
                raise self._wrong(f"ends inside {key!r:.80}")
            (length,) = _unpack_length(mapped, at)
            at += 8
            if length > size - at:
                raise self._wrong(f"has a string of {length} bytes in {key!r:.80}")
            strings.append(mapped[at : at + length])
            at += length
        self._at = at
        return strings

    def _tensor(self, name: str) -> tuple[BlockType, tuple[int, ...], int]:
        """Return the type, the shape and the offset of a tensor."""
        axes = self._integer(4)
        if not 1 <= axes <= _MOST_AXES:
            raise self._wrong(f"gives tensor {name!r:.80} {axes} axes, expected 1 to {_MOST_AXES}")
        shape = tuple(self._integer(8) for _ in range(axes))[::-1]
        number, offset = self._integer(4), self._integer(8)
        kind = TYPES_BY_ID.get(number)
        if kind is None:
            raise ModelError(
                f"tensor {name!r:.80} of {self._path} is stored as {type_name(number)}, which "
                f"Paceline does not read; expected {', '.join(TYPES)}"
            )
        if not all(1 <= size <= _LARGEST for size in shape):
            raise self._wrong(f"gives tensor {name!r:.80} the sizes {list(shape)}")
        if shape[-1] % kind.weights:
            raise self._wrong(
                f"stores tensor {name!r:.80} of {shape[-1]} inputs as {kind.name}, which needs a "
                f"multiple of {kind.weights}"
            )
        return kind, shape, offset

    def _place(
        self, infos: Mapping[str, tuple[BlockType, tuple[int, ...], int]], alignment: int
    ) -> dict[str, GGUFTensor]:
        """Return the tensors, which must lie in the file without overlap."""
        if not 1 <= alignment <= _LARGEST or alignment & (alignment - 1):
            raise self._wrong(f"is aligned to {alignment} bytes, expected a power of two")
        start = -(-self._at // alignment) * alignment
        ends: list[tuple[int, int, str]] = []
        tensors: dict[str, GGUFTensor] = {}
        for name, (kind, shape, offset) in infos.items():
            rows, row = math.prod(shape[:-1]), kind.row_bytes(shape[-1])
            begin, end = start + offset, start + offset + rows * row
            if offset % alignment or end > self._size:
                raise self._wrong(
                    f"places tensor {name!r:.80} at bytes {begin} to {end} of {self._size}, "
                    f"expected inside and at a multiple of {alignment}"
                )
            ends.append((begin, end, name))
            data = self._bytes[begin:end].reshape(rows, row)
            tensors[name] = GGUFTensor(name, kind.name, shape, data)
        ends.sort()
        for (_, end, one), (begin, _, other) in pairwise(ends):
            if begin < end:
                raise self._wrong(f"lets tensors {one!r:.80} and {other!r:.80} overlap")
        return tensors
