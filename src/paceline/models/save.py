"""Write a checkpoint tensor by tensor: one is in memory at a time, whatever the model's size."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from paceline.core import Floats
from paceline.errors import ModelError


@dataclass(frozen=True)
class Pending:
    """A tensor that is made when its turn comes.

    Attributes:
        shape: of the tensor.
        make: returns it, float32.
    """

    shape: tuple[int, ...]
    make: Callable[[], Floats]


def write_safetensors(path: Path, tensors: Mapping[str, Pending]) -> None:
    """Write float32 tensors in order. The file appears under its name when it is complete.

    Raises:
        ModelError: it cannot be written, e.g. the disk is full.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + 4 * math.prod(tensor.shape)
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor.make(), "<f4").data)

    _replace(path, write)


def write_json(path: Path, values: object) -> None:
    """Write JSON; the file appears under its name when it is complete.

    Raises:
        ModelError: it cannot be written.
    """
    text = json.dumps(values, indent=2) + "\n"
    _replace(path, lambda file: file.write(text.encode()))


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write to a temporary name and rename, so that no half-written file is ever found."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            write(file)
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise ModelError(f"cannot write {path}: {error.strerror or error}") from None
