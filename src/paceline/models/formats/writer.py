"""Write a checkpoint tensor by tensor: one is in memory at a time, whatever the model's size."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from paceline.errors import ModelError


@dataclass(frozen=True)
class Pending:
    """A tensor that is computed when it is written.

    Attributes:
        shape: of the tensor.
        make: returns it in the type that `dtype` names.
        dtype: as the format names it, e.g. F32; see `type_name`.
    """

    shape: tuple[int, ...]
    make: Callable[[], NDArray[Any]]
    dtype: str = "F32"


_NUMPY: dict[str, np.dtype[Any]] = {
    f"{letter}{8 * size}": np.dtype(f"<{kind}{size}")
    for letter, kind in (("F", "f"), ("I", "i"), ("U", "u"))
    for size in (1, 2, 4, 8)
    if letter != "F" or size > 1
}
_NUMPY["BF16"] = np.dtype("<u2")  # its bits


def type_name(dtype: np.dtype[Any]) -> str:
    """Return the name that the format gives to a NumPy type.

    Raises:
        ModelError: it has no such type.
    """
    for name, known in _NUMPY.items():
        if known == dtype:
            return name
    raise ModelError(f"safetensors has no type for {dtype}")


def write_safetensors(path: Path, tensors: Mapping[str, Pending]) -> None:
    """Write tensors in order; the file gets its name once it is complete.

    Raises:
        ModelError: it cannot be written, e.g. the disk is full.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        width = _NUMPY[tensor.dtype].itemsize
        begin, end = end, end + width * math.prod(tensor.shape)
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor.make(), _NUMPY[tensor.dtype]).data)

    replace_file(path, write)


def header_room(names: Iterable[str]) -> int:
    """Return bytes that a header has at most in which tensors of up to three axes are named."""
    return 64 + sum(128 + len(json.dumps(name)) for name in names)


def write_growing_safetensors(
    path: Path, tensors: Iterable[tuple[str, str, NDArray[Any]]], room: int
) -> int:
    """Write tensors whose sizes are not known before they are made; return their bytes.

    Args:
        path: the file, which gets its name once it is complete.
        tensors: (name, type, values), written in order, one in memory at a time.
        room: bytes kept free for the header; see `header_room`.

    Raises:
        ModelError: it cannot be written, e.g. the disk is full.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    room += -room % 8
    end = 0

    def write(file: BinaryIO) -> None:
        nonlocal end
        file.write(bytes(8 + room))
        for name, dtype, values in tensors:
            begin, end = end, end + values.nbytes
            header[name] = {"dtype": dtype, "shape": values.shape, "data_offsets": [begin, end]}
            file.write(np.ascontiguousarray(values, _NUMPY[dtype]).data)
        text = json.dumps(header, separators=(",", ":")).encode()
        if len(text) > room:
            raise ModelError(f"the header of {path} has {len(text)} bytes, room is for {room}")
        file.seek(0)
        file.write(room.to_bytes(8, "little") + text.ljust(room))

    replace_file(path, write)
    return end


def write_arrays(path: Path, arrays: Mapping[str, tuple[str, NDArray[Any]]]) -> None:
    """Write (type, values) by name; see `write_safetensors`, also for what it raises."""
    write_safetensors(path, {name: held(*each) for name, each in arrays.items()})


def held(dtype: str, values: NDArray[Any]) -> Pending:
    """Return a tensor that is in memory already."""
    return Pending(values.shape, lambda: values, dtype)


def write_json(path: Path, values: object) -> None:
    """Write JSON; the file gets its name once it is complete.

    Raises:
        ModelError: it cannot be written.
    """
    write_bytes(path, (json.dumps(values, indent=2) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file; it gets its name once it is complete.

    Raises:
        ModelError: it cannot be written.
    """
    replace_file(path, lambda file: file.write(content))


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write to a temporary name and rename, so that no half-written file is left.

    Raises:
        ModelError: the system refused, e.g. the disk is full.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            write(file)
        part.replace(path)
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
