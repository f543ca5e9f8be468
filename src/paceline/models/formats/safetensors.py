"""The safetensors format, read in place: nothing is copied, unpickled or executed.

The `safetensors` package copies every tensor and knows no bfloat16 without torch; here a tensor is
a view into the mapped file. The format: 8 bytes little-endian size of the header, the header as
JSON (name -> dtype, shape, data_offsets), then the tensors, which fill the rest without gaps.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.errors import ModelError
from paceline.models.fields import read_json

_LARGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors package
_DTYPES = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1"},
    **{"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1"},
    **{"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "u1"},
}
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A tensor as it lies in a file.

    Attributes:
        dtype: as the format names it, e.g. `BF16`.
        values: a read-only view; bits where numpy lacks the type, e.g. uint16 for bfloat16.
    """

    dtype: str
    values: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of `values`."""
        return self.values.shape

    @property
    def format(self) -> str:
        """Name of the type in lower case."""
        return self.dtype.lower()


def open_tensors(folder: Path) -> dict[str, Stored]:
    """Open every tensor of a checkpoint: `model.safetensors`, or the shards of its index.

    Raises:
        ModelError: there are none, or a file is truncated or inconsistent.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return read_file(single)
    if index.exists():
        return _read_shards(folder, index)
    try:
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
    except OSError as error:
        raise ModelError(f"cannot read {folder}: {error.strerror or error}") from None
    if pickled:
        raise ModelError(
            f"{folder} holds only pickled weights ({pickled[0]}), which can run code when they are "
            "read; load them in transformers where you trust them and save them again with "
            "save_pretrained, which writes model.safetensors"
        )
    raise ModelError(f"{folder} holds neither model.safetensors nor model.safetensors.index.json")


def read_file(path: Path) -> dict[str, Stored]:
    """Return the tensors of one file, as views into the mapped file.

    Raises:
        ModelError: as `open_tensors`.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise ModelError(
                    f"{path} is truncated or no safetensors file: {size} bytes cannot hold a "
                    f"header of {length} bytes; download it again"
                )
            header = _parse(path, file.read(length))
        start = 8 + length
        spans = {name: _span(path, name, entry) for name, entry in header.items()}
        _check_cover(path, spans, size - start)
        data = np.memmap(path, np.uint8, "r") if spans else np.empty(0, np.uint8)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from None
    return {
        name: Stored(dtype, data[start + begin : start + end].view(_DTYPES[dtype]).reshape(shape))
        for name, (dtype, shape, begin, end) in spans.items()
    }


_Span = tuple[str, tuple[int, ...], int, int]  # dtype, shape, begin, end


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise ValueError("a name occurs twice")
        return entries

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"the header of {path} is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise ModelError(f"the header of {path} is not a JSON object")
    header.pop("__metadata__", None)
    return header


def _span(path: Path, name: str, entry: Any) -> _Span:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = isinstance(dtype, str) and all(
            type(number) is int and number >= 0 for number in (*shape, begin, end)
        )
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise ModelError(f"the header of {path} is inconsistent at tensor {name!r:.80}")
    if dtype not in _DTYPES:
        raise ModelError(f"tensor {name!r:.80} of {path} has the unknown dtype {dtype!r:.20}")
    if end - begin != math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize:
        raise ModelError(
            f"tensor {name!r:.80} of {path} has {end - begin} bytes, which is not its shape "
            f"{shape!r:.80} in {dtype}"
        )
    return dtype, tuple(shape), begin, end


def _check_cover(path: Path, spans: dict[str, _Span], size: int) -> None:
    """Check that the tensors fill the file: no overlap, no gap, nothing after the end."""
    position = 0
    for name, (_, _, begin, end) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if begin != position:
            raise ModelError(
                f"tensor {name!r:.80} of {path} begins at byte {begin} where the one before ends "
                f"at {position}; the file is inconsistent, download it again"
            )
        position = end
    if position != size:
        raise ModelError(
            f"{path} is truncated or inconsistent: its header describes {position} bytes of "
            f"tensors and the file has {size}; download it again"
        )


def _read_shards(folder: Path, index: Path) -> dict[str, Stored]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelError(f"{index} has no weight_map; download it again")
    shards: dict[str, dict[str, Stored]] = {}
    tensors = {}
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ModelError(f"{index} places {name!r:.80} in {file!r:.80}, expected a file name")
        if file not in shards:
            shards[file] = read_file(folder / file)
        if name not in shards[file]:
            raise ModelError(f"{folder / file} lacks {name!r:.80}, which {index} places there")
        tensors[name] = shards[file][name]
    return tensors
