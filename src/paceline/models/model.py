"""Loads a checkpoint as one object."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from paceline.errors import ModelError
from paceline.models.config import ModelConfig
from paceline.models.fields import read_json
from paceline.models.formats.base_checkpoint import Base, base_of
from paceline.models.formats.gguf import GGUFFile
from paceline.models.formats.quantized import read_packing
from paceline.models.formats.stored_forms import StoredForms
from paceline.models.generation import Defaults, read_defaults, read_gguf_defaults
from paceline.models.gguf_config import read_gguf_config
from paceline.models.gguf_tokenizer import open_gguf_tokenizer
from paceline.models.hf_config import read_config
from paceline.models.hub import display_name, locate
from paceline.models.nested import Width
from paceline.models.tokenizer import Tokenizer, open_tokenizer
from paceline.models.weights import Weights, open_gguf_weights, open_weights

_END = 1 << 16  # bytes


@dataclass(frozen=True)
class Model:
    """A checkpoint.

    Attributes:
        path: its folder, or its GGUF file (of a split one the first part).
        config: its shape.
        weights: its tensors, read on access.
        defaults: its sampling settings and stop tokens.
        gguf: the opened GGUF file; None for a folder.
    """

    path: Path
    config: ModelConfig
    weights: Weights
    defaults: Defaults
    gguf: GGUFFile | None = None

    @property
    def name(self) -> str:
        """Name of the folder, or of the file without `.gguf`."""
        return display_name(self.path)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the checkpoint.

        Raises:
            ModelError: it has none, or an invalid one.
        """
        if self.gguf is None:
            return open_tokenizer(self.path)
        return open_gguf_tokenizer(self.gguf)

    def fingerprint(self) -> str:
        """Return a hash of the names, sizes and ends of its files, to identify the checkpoint.

        Raises:
            ModelError: a file cannot be read.
        """
        mark = hashlib.sha256(self.weights.cut.encode())
        for path in self._files():
            try:
                size = path.stat().st_size
                with path.open("rb") as file:
                    mark.update(f"{path.name} {size} ".encode() + file.read(_END))
                    file.seek(max(size - _END, 0))
                    mark.update(file.read(_END))
            except OSError as error:
                raise ModelError(f"cannot read {path}: {error.strerror or error}") from None
        return mark.hexdigest()[:24]

    def digest(self) -> str:
        """Return a hash of the whole content of its files, which takes a second for 1.5 GB.

        Raises:
            ModelError: a file cannot be read.
        """
        whole = hashlib.sha256(self.weights.cut.encode())
        for path in self._files():
            try:
                with path.open("rb") as file:
                    whole.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise ModelError(f"cannot read {path}: {error.strerror or error}") from None
        return whole.hexdigest()

    def _files(self) -> list[Path]:
        if self.gguf is not None:
            return list(self.gguf.files)
        return sorted((self.path / "config.json", *self.path.glob("*.safetensors")))


def load(source: str | Path | None = None, memory: int | Width | None = None) -> Model:
    """Open a checkpoint; check its settings and the names and shapes of its tensors.

    Args:
        source: a folder, a GGUF file, a hub id, or None for the embedded model; see `hub.locate`.
        memory: bytes that the weights may take, or bits of their codes; of nested matrices the
            last blocks are left out.

    Raises:
        ModelError: what is wrong with it, and what to do.
    """
    model = _load(locate(source))
    if memory is None:
        return model
    return replace(model, weights=model.weights.fit(memory))


def _load(folder: Path) -> Model:
    if folder.is_file():
        return _load_gguf(GGUFFile.open(folder))
    values = read_json(folder / "config.json")
    packing = read_packing(values)
    if isinstance(packing, StoredForms) and packing.base is not None:
        packing = replace(packing, base=_opened(folder, packing.base))
    if packing:
        values = values | {"quantization_config": None}
    config, family, biased = read_config(values)
    config, weights = open_weights(folder, config, family, biased, packing)
    return Model(folder, config, weights, read_defaults(folder, config))


def _opened(folder: Path, base: Base) -> Base:
    """Return the base of a checkpoint with its weights.

    Raises:
        ModelError: it is not there, has changed since, or has a base itself.
    """
    path = base.find(folder)
    if path.is_dir() and base_of(read_json(path / "config.json")) is not None:
        raise ModelError(
            f"{folder} holds changes to {path}, which holds changes itself; write {path} whole "
            "with `paceline convert`, and compress again"
        )
    model = _load(path)
    base.check(folder, path, model.fingerprint())
    return base.with_weights(model.weights)


def _load_gguf(file: GGUFFile) -> Model:
    config, family, biased = read_gguf_config(file)
    config, weights = open_gguf_weights(file, config, family, biased)
    return Model(file.path, config, weights, read_gguf_defaults(file, config), file)
