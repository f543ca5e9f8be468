"""The weights of a checkpoint under canonical names, read when they are asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.errors import ModelError
from paceline.models.config import ModelConfig
from paceline.models.families import Family
from paceline.models.formats.compressed_tensors import Packed, unpacked
from paceline.models.formats.safetensors import Stored, open_tensors, to_float32
from paceline.models.tensor_names import Place, Shape, places

_READABLE = ("F32", "F16", "BF16")
_Tensor = Stored | Packed


class Weights(Mapping[str, Floats]):
    """Canonical name -> float32 array, C-contiguous, matrices [out, in]; see `layout`.

    Names and shapes were checked when the checkpoint was opened. Values are checked when a tensor
    is first read: a NaN or an infinity is a `ModelError`. Arrays are read-only views into the
    mapped file where it holds float32 in this order, copies otherwise; nothing is kept.

    Args:
        folder: the checkpoint.
        tensors: what its files hold, without prefixes.
        places: where each canonical tensor lies.
        heads: query heads, for interleaved parts.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, _Tensor],
        places: Mapping[str, Place],
        heads: int,
    ) -> None:
        self.folder = folder
        self._tensors = tensors
        self._places = places
        self._heads = heads
        self._finite: set[str] = set()

    def __getitem__(self, name: str) -> Floats:
        dtype, values = self.stored(name)
        array = np.require(to_float32(dtype, values), np.float32, ["C", "A"])
        if name not in self._finite:
            self._check_finite(name, array)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def stored(self, name: str) -> tuple[str, NDArray[Any]]:
        """The tensor as the file holds it: `F32`, `F16` or `BF16` (uint16 bits), and a view.

        For engines that compute in these formats. Values are not checked. What is packed in fewer
        bits is unpacked to `F32`.
        """
        place = self._places[name]
        tensor = self._tensors[place.tensor]
        values = tensor.values.T if place.turned else tensor.values
        if place.part is not None:
            heads = values.reshape(self._heads, 3, -1, *values.shape[1:])
            values = heads[:, place.part].reshape(place.shape)
        elif place.rows is not None:
            values = values[place.rows]
        return tensor.dtype, values

    def formats(self) -> tuple[str, ...]:
        """The formats in use, e.g. `("bf16",)` or `("bf16", "int8")`."""
        return tuple(sorted({tensor.format for tensor in self._tensors.values()}))

    def _check_finite(self, name: str, array: Floats) -> None:
        # A finite sum has finite terms, and summing is one pass without a temporary; only a sum
        # that overflowed needs the slower look at every value.
        with np.errstate(all="ignore"):
            finite = np.isfinite(array.sum()) or np.isfinite(array).all()
        if not finite:
            raise ModelError(
                f"tensor {self._places[name].tensor} of {self.folder} holds NaN or infinite values"
            )
        self._finite.add(name)


def open_weights(
    folder: Path,
    config: ModelConfig,
    family: Family,
    biased: frozenset[str],
    bits: int | None = None,
) -> tuple[ModelConfig, Weights]:
    """The weights of `folder`, every name and shape checked against the config.

    Args:
        folder: holds the files.
        config: as config.json says.
        family: knows where tensors lie.
        biased: canonical linear maps that have a bias.
        bits: of packed matrices, where config.json speaks of them.

    Returns:
        the config, whose `tied` says what the files hold, and the weights.

    Raises:
        ModelError: a tensor is missing, unexpected, or of another shape.
    """
    files: Mapping[str, _Tensor] = open_tensors(folder)
    tensors = _strip(folder, unpacked(folder, files, bits) if bits else files, family)
    wanted = places(config, family, biased)
    if config.tied:
        config = replace(config, tied=_tie(tensors, wanted))
    _check(folder, tensors, wanted)
    return config, Weights(folder, tensors, wanted, config.layers[0].heads)


def _strip(folder: Path, tensors: Mapping[str, _Tensor], family: Family) -> dict[str, _Tensor]:
    """Tensors without their prefixes and without what is no weight."""
    stripped: dict[str, _Tensor] = {}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in family.prefixes if name.startswith(prefix)), "")
        bare = name[len(prefix) :]
        bare = family.aliases.get(bare, bare)
        if re.search(family.skipped, bare):
            continue
        if bare in stripped:
            raise ModelError(f"{folder} holds tensor {bare!r:.80} twice, with and without a prefix")
        stripped[bare] = tensor
    return stripped


def _tie(tensors: dict[str, _Tensor], wanted: dict[str, Place]) -> bool:
    """Leave one of embedding and head where the config ties them; False if they differ."""
    embed, head = wanted["embed"].tensor, wanted["head"].tensor
    if head in tensors:
        if embed not in tensors:
            tensors[embed] = tensors[head]
        elif not np.array_equal(tensors[embed].values, tensors[head].values):
            return False
        del tensors[head]
    del wanted["head"]
    return True


def _check(folder: Path, tensors: Mapping[str, _Tensor], wanted: Mapping[str, Place]) -> None:
    shapes = {place.tensor: place.stored for place in wanted.values()}
    for name, shape in shapes.items():
        if name not in tensors:
            raise ModelError(f"{folder} lacks tensor {name}, which its config.json asks for")
        if tensors[name].dtype not in _READABLE:
            raise ModelError(
                f"tensor {name} of {folder} is stored as {tensors[name].dtype}, expected "
                f"{', '.join(_READABLE)}; quantised and packed weights are not supported"
            )
        found = tensors[name].shape
        if found != shape:
            raise ModelError(
                f"tensor {name} of {folder} has shape {_show(found)}, expected {_show(shape)} by "
                "its config.json"
            )
    for name in tensors:
        if name not in shapes:
            raise ModelError(
                f"{folder} holds tensor {name!r:.80}, which its config.json does not account for"
            )


def _show(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "of a single number"
