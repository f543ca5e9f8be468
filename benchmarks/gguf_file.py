"""Write weights as a GGUF file, so that llama.cpp can run the very weights that we run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from paceline.core import Floats
from paceline.models import Model
from paceline.models.config import ModelConfig
from paceline.models.export.gguf import GGUFExport
from paceline.models.export.gguf_types import GGUFFormat
from paceline.models.generation import Defaults


def write(path: Path, config: ModelConfig, weights: Mapping[str, Floats], kind: str) -> None:
    """Write a model that has a shape and weights but no folder, and so no tokenizer.

    Args:
        path: of the file.
        config: the shape.
        weights: canonical name -> float32 array.
        kind: type of the matrices, embedding and head included, e.g. `Q8_0`.
    """
    model = Model(Path(path.stem), config, weights, Defaults(frozenset()))
    write_model(path, model, kind)


def write_model(path: Path, model: Model, kind: str) -> None:
    """Write a model with its tokenizer; all matrices are of the same type."""
    GGUFExport(model, GGUFFormat(kind, kind)).write(path)
