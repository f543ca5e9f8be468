"""Write any model that Paceline reads as a folder that transformers loads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.errors import MethodError, ModelError, unknown
from paceline.models.config import ModelConfig
from paceline.models.export.assembly import Assembled, assemble, whole
from paceline.models.export.comparison import differences
from paceline.models.export.hf_settings import transformers_settings
from paceline.models.export.hf_tokenizer import tokenizer_files
from paceline.models.formats.gguf_quantize import quantize
from paceline.models.formats.gguf_writer import check_space
from paceline.models.formats.writer import Pending, write_bytes, write_json, write_safetensors
from paceline.models.hf_config import read_config
from paceline.models.model import Model
from paceline.models.tensor_names import Place, places

FORMATS = ("auto", "f32", "f16", "bf16")
_ALIASES = {"fp32": "f32", "fp16": "f16"}
_TORCH = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class SafetensorsExport:
    """A model that is ready to be written: everything is decided and checked, nothing converted.

    Args:
        model: the source.
        dtype: one of `FORMATS`; `auto` keeps floating-point types, and writes what is quantised
            as f16.

    Attributes:
        dtype: of all tensors, `F32`, `F16` or `BF16`.
        types: how many tensors have each type.
        fallbacks: (requested type, type taken) -> tensors; none here, every row can be written.
        notes: what a reader of the result should know, in sentences.

    Raises:
        ModelError: transformers has no such model; what differs, and what to do.
        MethodError: an unknown format.
    """

    def __init__(self, model: Model, dtype: str = "auto") -> None:
        self._model = model
        self.dtype = _choose(model, dtype)
        self.notes: list[str] = []
        self._settings = transformers_settings(model) | {"dtype": _TORCH[self.dtype]}
        config, family, biased = read_config(self._settings)
        wanted = places(config, family, biased)
        if model.config.tied:
            wanted.pop("head", None)
        check_describes(model, config, wanted)
        self._offset = np.float32(model.config.norm_offset - config.norm_offset)
        self._tensors = {_full_name(each, family.prefixes): each for each in assemble(wanted)}
        self.types = Counter({self.dtype: len(self._tensors)})
        self.fallbacks: Counter[tuple[str, str]] = Counter()
        self._texts = tokenizer_files(model)
        if _is_quantised(model):
            self.notes.append(
                f"quantised matrices are written as {self.dtype} numbers, which take more room"
            )
        if "tokenizer.json" not in self._texts:
            self.notes.append("the folder has no tokenizer, as the source has none")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, for a progress bar."""
        size = np.dtype(_STORED[self.dtype]).itemsize
        return size * sum(int(np.prod(each.shape)) for each in self._tensors.values())

    def write(self, folder: Path, tick: Callable[[int], None] | None = None) -> int:
        """Write the folder; return the bytes of its tensors.

        config.json comes last: a folder that has one is complete.

        Args:
            folder: made where it does not exist.
            tick: called with the number of bytes after each tensor.

        Raises:
            ModelError: it cannot be written, or the type cannot hold a tensor.
        """
        check_space(folder / "model.safetensors", self.nbytes)
        try:
            write_safetensors(folder / "model.safetensors", self._pending(tick))
            for name, content in self._texts.items():
                write_bytes(folder / name, content)
            write_json(folder / "config.json", self._settings)
        except BaseException:
            remove_files(folder, ("model.safetensors", *self._texts))
            raise
        return self.nbytes

    def _pending(self, tick: Callable[[int], None] | None) -> Mapping[str, Pending]:
        """Return the tensors of the file by name."""
        return {
            name: Pending(each.shape, partial(self._values, each, tick), self.dtype)
            for name, each in self._tensors.items()
        }

    def _values(self, tensor: Assembled, tick: Callable[[int], None] | None) -> NDArray[Any]:
        values = whole(self._model.weights, tensor)
        if self._offset and tensor.names[0].endswith("norm"):
            values = values + self._offset
        try:
            rows = values if values.ndim == 2 else values[None]
            stored = quantize(self.dtype, rows).view(_STORED[self.dtype]).reshape(values.shape)
        except ModelError as error:
            raise ModelError(f"tensor {tensor.name} cannot be written: {error}") from None
        if tick:
            tick(stored.nbytes)
        return stored


def _choose(model: Model, text: str) -> str:
    """Return the type of all tensors."""
    name = _ALIASES.get(text.lower(), text.lower())
    if name not in FORMATS:
        raise MethodError(f"{unknown('format of safetensors', text, FORMATS)}")
    if name != "auto":
        return name.upper()
    weights = model.weights
    kinds = {weights.float_type(name) or "F16" for name in weights if len(weights.shape(name)) == 2}
    if len(kinds) == 1:
        return str(kinds.pop())
    return "F32" if "F32" in kinds else "F16"


def _is_quantised(model: Model) -> bool:
    return any(model.weights.float_type(name) is None for name in model.weights)


def check_describes(model: Model, config: ModelConfig, wanted: dict[str, Place]) -> None:
    """Refuse settings and names that describe another model than the source."""
    lost = differences(model.config, config)
    lost += [f"the tensor {name}" for name in sorted(model.weights.keys() - wanted.keys())][:1]
    lost += [f"a missing {name}" for name in sorted(wanted.keys() - model.weights.keys())][:1]
    if lost:
        raise ModelError(
            f"{config.family} models of transformers cannot be this one: {', '.join(lost)} would "
            "be lost; write a GGUF file instead"
        )


def _full_name(tensor: Assembled, prefixes: tuple[str, ...]) -> str:
    """Return the name in the file: the head alone has no prefix."""
    prefix = prefixes[0] if prefixes and tensor.names[0] != "head" else ""
    return prefix + tensor.name


def remove_files(folder: Path, names: Collection[str]) -> None:
    """Remove what was written of a folder that is not complete."""
    for name in names:
        with suppress(OSError):
            (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
