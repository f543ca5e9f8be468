"""Write a model in fewer bytes without loss, as a folder that Paceline reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.errors import ModelError
from paceline.machine import usable_cores
from paceline.models.export.hf_settings import hf_settings
from paceline.models.export.hf_tokenizer import tokenizer_files
from paceline.models.export.safetensors import check_describes, remove_files
from paceline.models.formats.gguf_writer import check_space
from paceline.models.formats.safetensors import Stored
from paceline.models.formats.stored_forms import arrays_of, scheme
from paceline.models.formats.writer import (
    header_room,
    write_bytes,
    write_growing_safetensors,
    write_json,
)
from paceline.models.hf_config import read_config
from paceline.models.model import Model
from paceline.models.tensor_names import places
from paceline.models.tensors import BlockQuantized, Dense, Linear, PackedFloats, pack_smallest

RECIPE = "lossless"  # in place of a recipe of `paceline compress`
_TORCH = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_PACKED_PARTS = ("meta", "data", "sizes", "checksums", "mask")


@dataclass
class Sizes:
    """What packing came to.

    Attributes:
        source: bytes of the weights as the source stores them.
        packed_source: those of the matrices that were packed, before.
        packed: and after.
        unpack_seconds: that decoding all of them took on this machine.
    """

    source: int = 0
    packed_source: int = 0
    packed: int = 0
    unpack_seconds: float = 0.0


class LosslessExport:
    """A model that is ready to be written with its floating-point matrices packed.

    Matrices of floating-point numbers take the smallest of three forms: as they are, packed, or
    packed without their zeros. Each is decoded again and compared before it is written. Vectors
    stay as they are, and so do matrices in other forms, e.g. the blocks of a GGUF file.

    Args:
        model: the source.

    Attributes:
        types: how many tensors have each form; known once they are written.
        fallbacks: none here.
        notes: what a reader of the result should know, in sentences.
        sizes: what packing came to; known once the folder is written.

    Raises:
        ModelError: config.json cannot describe the model; what differs.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        floats: Counter[str] = Counter()
        self.sizes = Sizes()
        self._names: list[str] = []  # of the tensors that will be written, and a few more
        for name in model.weights:
            weight = model.weights.stored(name)
            self.sizes.source += _nbytes(weight)
            if isinstance(weight, Dense):
                floats[weight.dtype] += 1
                self._names += [f"{name}:{part}" for part in _PACKED_PARTS]
            else:
                self._names += arrays_of(name, weight) if isinstance(weight, Linear) else [name]
        dtype = floats.most_common(1)[0][0] if floats else "F32"
        settings = hf_settings(model) | {"dtype": _TORCH[dtype]}
        config, family, biased = read_config(settings)
        wanted = places(config, family, biased)
        if model.config.tied:
            wanted.pop("head", None)
        check_describes(model, config, wanted)
        self._settings = settings | {"quantization_config": scheme(RECIPE)}
        self._offset = np.float32(model.config.norm_offset - config.norm_offset)
        self._texts = tokenizer_files(model)
        self.types: Counter[str] = Counter()
        self.fallbacks: Counter[tuple[str, str]] = Counter()
        self.notes = ["Paceline reads the folder; other programs need it converted back"]
        if "tokenizer.json" not in self._texts:
            self.notes.append("the folder has no tokenizer, as the source has none")

    @property
    def nbytes(self) -> int:
        """Bytes of all weights in the source, for a progress bar."""
        return self.sizes.source

    def write(self, folder: Path, tick: Callable[[int], None] | None = None) -> int:
        """Write the folder; return the bytes of its tensors.

        One matrix is in memory at a time. config.json comes last: a folder that has one is
        complete.

        Args:
            folder: made where it does not exist.
            tick: called with the number of source bytes after each weight.

        Raises:
            ModelError: it cannot be written.
        """
        check_space(folder / "model.safetensors", self.nbytes)
        path = folder / "model.safetensors"
        try:
            size = write_growing_safetensors(path, self._tensors(tick), header_room(self._names))
            for name, content in self._texts.items():
                write_bytes(folder / name, content)
            write_json(folder / "config.json", self._settings)
        except BaseException:
            remove_files(folder, ("model.safetensors", *self._texts))
            raise
        return size

    def _tensors(
        self, tick: Callable[[int], None] | None
    ) -> Iterator[tuple[str, str, NDArray[Any]]]:
        for name in self._model.weights:
            weight = self._model.weights.stored(name)
            if isinstance(weight, Stored):
                self.types[weight.dtype] += 1
                yield name, weight.dtype, self._vector(name, weight)
            else:
                matrix = self._pack(name, weight) if isinstance(weight, Dense) else weight
                self.types[_form(matrix)] += 1
                for part, (kind, values) in arrays_of(name, matrix).items():
                    yield part, kind, values
            if tick:
                tick(_nbytes(weight))

    def _pack(self, name: str, matrix: Dense) -> Dense | PackedFloats:
        threads = usable_cores()
        packed = pack_smallest(matrix, threads)
        if isinstance(packed, PackedFloats):
            start = perf_counter()
            again = packed.unpack(threads)
            self.sizes.unpack_seconds += perf_counter() - start
            if again.values.tobytes() != matrix.values.tobytes():
                raise ModelError(f"packing {name} lost something; please report this as a bug")
            self.sizes.packed_source += matrix.nbytes
            self.sizes.packed += packed.nbytes
        return packed

    def _vector(self, name: str, weight: Stored) -> NDArray[Any]:
        """Return a vector, with the offset of norms that differs between formats taken out.

        Raises:
            ModelError: that would round it.
        """
        if not self._offset or not name.endswith("norm"):
            return weight.values
        moved = weight.values + self._offset
        if weight.dtype != "F32" or not np.array_equal(moved - self._offset, weight.values):
            raise ModelError(
                f"the norm {name} cannot be written without loss: config.json counts it from "
                f"{self._offset:g}, which rounds its {weight.dtype} numbers"
            )
        return moved


def _nbytes(weight: Linear | Stored) -> int:
    return weight.values.nbytes if isinstance(weight, Stored) else weight.nbytes


def _form(matrix: Linear) -> str:
    """Return what the form of a matrix is called in the output."""
    if isinstance(matrix, PackedFloats):
        zeros = "" if matrix.mask is None else " without zeros"
        return f"{matrix.dtype} packed{zeros}"
    if isinstance(matrix, Dense):
        return matrix.dtype
    return matrix.type if isinstance(matrix, BlockQuantized) else type(matrix).__name__.lower()
