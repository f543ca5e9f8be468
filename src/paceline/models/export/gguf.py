"""Write any model that Paceline reads as a GGUF file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.errors import ModelError
from paceline.models.config import ModelConfig
from paceline.models.export.assembly import (
    Assembled,
    as_matrix,
    assemble,
    form_name,
    row_pieces,
)
from paceline.models.export.gguf_metadata import (
    check_same,
    find_architecture,
    gguf_settings,
    rope_tensors,
)
from paceline.models.export.gguf_mixes import MIXES, Position
from paceline.models.export.gguf_tokenizer import tokenizer_metadata
from paceline.models.export.gguf_types import FILE_TYPES, GGUFFormat, own_type
from paceline.models.export.llama_cpp import (
    check_llama_cpp,
    llama_cpp_differences,
    required_biases,
)
from paceline.models.export.settings import as_fields, family_of, model_settings
from paceline.models.family import Family
from paceline.models.formats.gguf_quantize import quantize
from paceline.models.formats.gguf_repack import is_exact, to_blocks
from paceline.models.formats.gguf_writer import PendingTensor, Value, write_gguf
from paceline.models.gguf_architectures import Architecture
from paceline.models.gguf_config import layer_modules, located_family
from paceline.models.model import Model
from paceline.models.tensor_names import places
from paceline.models.tensors import BlockQuantized, Dense, Grouped, Linear
from paceline.models.weights import Weights

Bytes = NDArray[np.uint8]
_OF_THE_FILE = ("general.architecture", "general.alignment", "general.file_type")
_KEPT_FLOAT = ("positions",)  # not quantised by llama.cpp either


@dataclass
class GGUFExport:
    """A model that is ready to be written: everything is decided and checked, nothing converted.

    Args:
        model: the source.
        format: types of its matrices.
        importance: weights of squared errors by canonical name, [inputs] each, for the searches of
            scales; None for all alike.

    Attributes:
        types: how many tensors have each type.
        fallbacks: (requested type, type taken) -> tensors whose rows are too short for it.
        notes: what a reader of the result should know, in sentences.

    Raises:
        ModelError: GGUF cannot express the model; which part, and what to do.
    """

    model: Model
    format: GGUFFormat
    importance: Mapping[str, Floats] | None = None
    types: Counter[str] = field(default_factory=Counter, init=False)
    fallbacks: Counter[tuple[str, str]] = field(default_factory=Counter, init=False)
    notes: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        """Decide what will be written."""
        config = self.model.config
        name, arch = find_architecture(config)
        settings = as_fields(self.model, model_settings(self.model))
        divisors = rope_tensors(config, settings)
        family = family_of(self.model, settings.values)
        self._widened: list[str] = []  # matrices that have no type, in words
        self._repacked: set[str] = set()  # tensors whose integers are kept
        self._rounded = 0  # among them those whose scales are not
        assembled = _assembled(config, family, arch, self.model.weights)
        self._fused = [each.names for each in assembled if each.is_matrix and len(each.names) > 1]
        self._tensors = {each: _vector(values) for each, values in divisors.items()}
        for each in assembled:
            self._tensors[each.name] = self._pending(each, arch)
        self._tensors |= {
            bias: _vector(np.zeros(self._tensors[weight].shape[0], np.float32))
            for weight, bias in required_biases(name, config)
            if bias not in self._tensors
        }
        own = gguf_settings(config, settings, name, arch)
        check_same(
            config,
            {"general.architecture": name, **own},
            {tensor: each.shape for tensor, each in self._tensors.items()},
            divisors,
        )
        check_llama_cpp(name, config, self.model.weights)
        tokenizer, self.notes = tokenizer_metadata(self.model)
        self.notes += llama_cpp_differences(name, config)
        self.notes += self._form_notes()
        self._metadata: dict[str, Value] = {
            "general.architecture": name,
            **_general(self.model),
            "general.quantization_version": 2,
            "general.file_type": self._file_type(),
            **own,
            **tokenizer,
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, for a progress bar."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def write(self, path: Path, tick: Callable[[int], None] | None = None) -> int:
        """Write the file; return its size in bytes.

        Args:
            path: of the file.
            tick: called with the number of bytes after each piece.

        Raises:
            ModelError: it cannot be written, or a tensor cannot be converted.
        """
        return write_gguf(path, self._metadata, self._tensors, tick)

    def _pending(self, tensor: Assembled, arch: Architecture) -> PendingTensor:
        kind = "F32"
        if tensor.is_matrix and tensor.names[0] not in _KEPT_FLOAT:
            kind = self._choose(tensor)
        self.types[kind] += 1
        offset = 0.0
        if arch.folded_norms and tensor.name.endswith("norm.weight"):
            offset = self.model.config.norm_offset
        return PendingTensor(kind, tensor.shape, lambda: self._pieces(tensor, kind, offset))

    def _choose(self, tensor: Assembled) -> str:
        """Return the type of a matrix; half precision where fused parts have different ones."""
        matrices = {name: as_matrix(self.model.weights[name]) for name in tensor.names}
        at = Position.of(tensor.names, self.model.config)
        choices = {self.format.choose(matrix, at) for matrix in matrices.values()}
        grouped = [each for each in matrices.values() if isinstance(each, Grouped)]
        kinds = {own_type(each) for each in matrices.values()}
        if grouped and len(kinds) == 1 and kinds == {kind for kind, _ in choices}:
            self._repacked.add(tensor.name)
            self._rounded += not all(map(is_exact, grouped))
        if (self.format.head if at is None else self.format.layers) is None:
            self._widened += _without_type(matrices, len(choices) > 1)
        if len(choices) > 1:
            return "F16"
        [(kind, wanted)] = choices
        if wanted:
            self.fallbacks[wanted, kind] += 1
        return kind

    @property
    def fused(self) -> list[tuple[str, ...]]:
        """Canonical names of the matrices that lie in one tensor each, of those with several."""
        return self._fused

    def _form_notes(self) -> list[str]:
        """Return in sentences what becomes of matrices that GGUF cannot hold as they are."""
        notes = []
        if self._widened:
            notes.append(
                f"{len(self._widened)} quantised matrices are of a kind that GGUF has no type for, "
                f"e.g. {self._widened[0]}, and are written as F16; a format makes them small again"
            )
        if self._rounded:
            notes.append(
                f"the scales of {self._rounded} matrices of integers are rounded to half precision"
            )
        return notes

    @property
    def unsupported(self) -> str | None:
        """A matrix that has no type of GGUF and is written in half precision, and its form."""
        return self._widened[0] if self._widened else None

    def _pieces(self, tensor: Assembled, kind: str, offset: float) -> Iterator[Bytes]:
        importance = (self.importance or {}).get(tensor.names[0])
        for rows in row_pieces(self.model.weights, tensor):
            if isinstance(rows, BlockQuantized) and rows.type == kind:
                yield rows.data
                continue
            if isinstance(rows, Grouped) and tensor.name in self._repacked:
                yield to_blocks(rows, kind)
                continue
            values = rows.dense() + np.float32(offset) if offset else rows.dense()
            try:
                yield quantize(kind, values, importance)
            except ModelError as error:
                raise ModelError(f"tensor {tensor.name} cannot be written: {error}") from None

    def _file_type(self) -> int:
        """Return llama.cpp's number for the mix, or for the type of most matrices."""
        if mix := MIXES.get(self.format.layers or ""):
            return mix.file_type
        matrices = {kind: count for kind, count in self.types.items() if kind != "F32"}
        most = max(matrices, key=lambda kind: matrices[kind]) if matrices else "F32"
        return FILE_TYPES[most]


def _assembled(
    config: ModelConfig, family: Family, arch: Architecture, weights: Weights
) -> list[Assembled]:
    """Return the tensors of the file in order; queries, keys and values fused as in the family."""
    alternatives = {
        module
        for module, names in arch.alternatives.items()
        if all(_has(weights, family, name) for name in names.values())
    }
    located = located_family(family, arch, layer_modules(arch, alternatives))
    modules = [*located.layer.values(), *located.outer.values()]
    biased = frozenset(
        name
        for names in modules
        for name in names.split()
        if not name.endswith("norm")
        and (f"layers.0.{name}.bias" in weights or f"{name}.bias" in weights)
    )
    wanted = places(config, located, biased)
    if config.tied:
        wanted.pop("head", None)
    if missing := sorted(weights.keys() - wanted.keys()):
        raise ModelError(
            f"GGUF has no place for {missing[0]} of {config.family} models in its architecture; "
            "write a safetensors folder instead"
        )
    absent = sorted(wanted.keys() - weights.keys())
    if absent:
        raise ModelError(f"{config.family} models have no {absent[0]}, which GGUF files need")
    return assemble(wanted)


def _without_type(matrices: Mapping[str, Linear], mixed: bool) -> list[str]:
    """Return the quantised matrices that have no type, or none in common with those beside them."""
    return [
        f"{name} ({form_name(each)})"
        for name, each in matrices.items()
        if own_type(each) is None or (mixed and not isinstance(each, Dense))
    ]


def _has(weights: Weights, family: Family, names: str) -> bool:
    """Return whether a family has a module of its own for some names of a layer."""
    if " " in names:
        return names in family.layer.values()
    return f"layers.0.{names}" in weights and names not in family.shared


def _vector(values: Floats) -> PendingTensor:
    return PendingTensor("F32", values.shape, lambda: iter([quantize("F32", values[None])]))


def _general(model: Model) -> dict[str, Value]:
    """Return name, licence and the like of a GGUF file; else the name and sampling defaults."""
    if model.gguf is not None:
        found = model.gguf.metadata.items()
        kept = {key: value for key, value in found if key.startswith("general.")}
        return {key: value for key, value in kept.items() if key not in _OF_THE_FILE}
    own: dict[str, Value] = {"general.type": "model", "general.name": model.name}
    defaults = model.defaults
    if defaults.temperature:  # a file without one is greedy
        own["general.sampling.temp"] = defaults.temperature
        for name, value in defaults.samplers().items():
            key = "penalty_repeat" if name == "repetition_penalty" else name
            own[f"general.sampling.{key}"] = int(value) if name == "top_k" else float(value)
    return own
