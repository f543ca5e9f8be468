"""Write a compressed checkpoint: canonical tensors in their stored forms, and the settings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from paceline.compress.base import MATRICES, Statistics
from paceline.compress.work_folder import WorkFolder
from paceline.errors import ModelError
from paceline.models import load
from paceline.models.export.hf_settings import hf_settings
from paceline.models.export.hf_tokenizer import tokenizer_files
from paceline.models.export.safetensors import check_describes
from paceline.models.fields import read_json
from paceline.models.formats.base_checkpoint import Base, base_of, changes
from paceline.models.formats.safetensors import Stored, read_file
from paceline.models.formats.shared_layers import SHARED
from paceline.models.formats.stored_forms import arrays_of, scheme
from paceline.models.formats.writer import write_arrays, write_bytes, write_json
from paceline.models.hf_config import read_config
from paceline.models.layer_shapes import shape_settings
from paceline.models.tensor_names import places

if TYPE_CHECKING:
    from paceline.compress.recipe import Recipe
    from paceline.models import Model
    from paceline.models.config import LayerConfig, ModelConfig

Arrays = dict[str, tuple[str, NDArray[Any]]]


@dataclass(frozen=True)
class Target:
    """What is checked of a model before its compression begins.

    Attributes:
        settings: of the config.json that will be written.
        norm_offset: what is added to the norms that are written.
        texts: contents of the tokenizer's files by name.
    """

    settings: Mapping[str, Any]
    norm_offset: float
    texts: Mapping[str, bytes]

    @classmethod
    def of(cls, model: Model, recipe: Recipe) -> Target:
        """Check that a checkpoint can describe a model.

        Raises:
            ModelError: it cannot; what would be lost.
        """
        settings = hf_settings(model) | {"dtype": "float32"}
        config, family, biased = read_config(settings)
        wanted = places(config, family, biased)
        if model.config.tied:
            wanted.pop("head", None)
        check_describes(model, config, wanted)
        settings["quantization_config"] = scheme(str(recipe), _base(model, recipe))
        offset = model.config.norm_offset - config.norm_offset
        return cls(settings, offset, tokenizer_files(model))

    def reshaped(
        self,
        config: ModelConfig,
        kept: Sequence[tuple[int, LayerConfig]],
        biases: frozenset[str],
        made: ModelConfig,
    ) -> Target:
        """Return what is written of a model some of whose parts were left out.

        Args:
            config: of the model that is compressed.
            kept: for each layer that is left, its index there, and its new shape.
            biases: matrices that got a bias.
            made: config of what is left.

        Raises:
            ModelError: config.json has no words for another hidden size of this family.
        """
        added = shape_settings(self.settings, config.layers, kept, biases)
        settings = {**self.settings, **added}
        if (made.hidden_size, made.tied) != (config.hidden_size, config.tied):
            settings |= {
                "hidden_size": made.hidden_size,
                "head_dim": made.layers[0].head_dim,
                "tie_word_embeddings": made.tied,
            }
            read = read_config({**settings, "quantization_config": None})[0]
            offset = config.norm_offset - read.norm_offset
            if replace(read, norm_offset=read.norm_offset + offset) != made:
                raise ModelError(
                    f"the config.json of {config.family} cannot say a hidden size of "
                    f"{made.hidden_size}; take narrow or layer_drop"
                )
        return replace(self, settings=settings)

    def sharing(self, layers: Mapping[int, int]) -> Target:
        """Return what is written where layers have the matrices of others: layer -> the other."""
        if not layers:
            return self
        named = {str(layer): source for layer, source in layers.items()}
        described = {**self.settings["quantization_config"], SHARED: named}
        return replace(self, settings={**self.settings, "quantization_config": described})


@dataclass(frozen=True)
class Size:
    """Bytes of a checkpoint's tensors.

    Attributes:
        total: of all tensors.
        matrices: of the matrices in the blocks, with scales, minima and factors.
        weights: their number of weights.
    """

    total: int
    matrices: int
    weights: int

    @property
    def bits_per_weight(self) -> float:
        """Bits for a weight of the matrices in the blocks, all told."""
        return 8 * self.matrices / self.weights


def write_checkpoint(
    folder: Path,
    model: Model,
    recipe: Recipe,
    target: Target,
    work: WorkFolder,
    layers: int,
    outer: Mapping[str, NDArray[Any]] = MappingProxyType({}),
) -> Size:
    """Write the finished blocks and what lies outside them into a folder.

    config.json comes last: a folder that has one is complete.

    Args:
        folder: that is made.
        model: the source.
        recipe: what becomes of it.
        target: settings and tokenizer.
        work: holds the finished blocks.
        layers: how many there are.
        outer: float32 tensors outside the blocks that are new.

    Raises:
        ModelError: it cannot be written.
        MethodError: the recipe of the head does not fit it.
    """
    arrays = _outer(model, recipe, outer)
    for index in range(layers):
        tensors = read_file(work.final_file(index))
        arrays |= {name: (each.dtype, each.values) for name, each in tensors.items()}
    base = base_of(target.settings)
    if base is not None:
        arrays = changes(arrays, load(base.find(folder)).weights)
    if target.norm_offset:
        arrays = {name: _moved(name, *each, target.norm_offset) for name, each in arrays.items()}
    write_arrays(folder / "model.safetensors", arrays)
    for name, content in target.texts.items():
        write_bytes(folder / name, content)
    write_json(folder / "config.json", dict(target.settings))
    return _size(arrays)


def _base(model: Model, recipe: Recipe) -> Base | None:
    """Return the checkpoint that only differences from are written; None to write all.

    Raises:
        ModelError: it is no checkpoint, or holds differences itself.
    """
    path = recipe.changes_of
    if path is None:
        return None
    base = load(path) if path else model
    held = base.path.is_dir() and base_of(read_json(base.path / "config.json")) is not None
    if held:
        raise ModelError(
            f"{base.path} holds changes to another checkpoint, and can be no base itself; write "
            "it whole with `paceline convert` first"
        )
    return Base.named(base.path, base.fingerprint())


def _outer(
    model: Model, recipe: Recipe, new: Mapping[str, NDArray[Any]] = MappingProxyType({})
) -> Arrays:
    """Return what lies outside the blocks: as it is stored, or as the head's recipe says."""
    arrays: Arrays = {}
    names = [name for name in model.weights if not name.startswith("layers.")]
    for name in dict.fromkeys([*names, *new]):
        weight: Any = Stored("F32", new[name]) if name in new else model.weights.stored(name)
        if recipe.head.compressors and name in ("embed", "head"):
            import torch

            dense = new[name] if name in new else model.weights.dense(name)
            values = torch.from_numpy(np.array(dense))
            weight = recipe.head.compress(values, Statistics())
        if isinstance(weight, Stored):
            arrays[name] = (weight.dtype, weight.values)
        else:
            arrays |= arrays_of(name, weight)
    return arrays


def outer_bytes(model: Model, recipe: Recipe) -> int:
    """Return the bytes of what lies outside the blocks, as `write_checkpoint` writes it.

    Raises:
        MethodError: the recipe of the head does not fit it.
    """
    return sum(values.nbytes for _, values in _outer(model, recipe).values())


def _moved(name: str, kind: str, values: NDArray[Any], offset: float) -> tuple[str, NDArray[Any]]:
    if not name.endswith("norm"):
        return kind, values
    if kind != "F32":
        raise ModelError(f"the norm {name} is {kind}, expected F32")
    return kind, values + np.float32(offset)


def _size(arrays: Arrays) -> Size:
    total = sum(values.nbytes for _, values in arrays.values())
    matrices = weights = 0
    for name, (_, values) in arrays.items():
        owner, _, part = name.partition(":")
        if owner.rpartition(".")[2] not in MATRICES or not owner.startswith("layers."):
            continue
        if part == "meta":
            rows, columns = json.loads(bytes(values))["shape"]
            weights += rows * columns
        elif not part.endswith(".meta"):
            matrices += values.nbytes
            weights += 0 if part else values.size
    return Size(total, matrices, weights)


def stored_size(model: Model) -> Size:
    """Return the sizes of a checkpoint's tensors as they are stored."""
    matrices = weights = 0
    for name in model.weights:
        if name.startswith("layers.") and name.rpartition(".")[2] in MATRICES:
            stored = model.weights[name]
            matrices += int(stored.nbytes)
            weights += math.prod(stored.shape)
    return Size(model.weights.nbytes(), matrices, weights)


def is_compressed(model: Model) -> bool:
    """Return whether a matrix of the blocks is stored in fewer bits than floating-point numbers."""
    layers = (name for name in model.weights if name.startswith("layers."))
    return any(model.weights.float_type(name) is None for name in layers)
