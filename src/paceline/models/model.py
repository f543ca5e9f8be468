"""A checkpoint as one object: `load(path)` and what it holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from paceline.errors import ModelError
from paceline.models.checkpoint import Weights, open_weights
from paceline.models.config import ModelConfig
from paceline.models.fields import read_json
from paceline.models.shape import read_config


@dataclass(frozen=True)
class Model:
    """A checkpoint.

    Attributes:
        path: its folder.
        config: its shape.
        weights: its tensors, read when asked for.
    """

    path: Path
    config: ModelConfig
    weights: Weights


def load(source: str | Path) -> Model:
    """Open a checkpoint. Checks its config and the names and shapes of its tensors.

    Raises:
        ModelError: what is wrong with it, and what to do.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise ModelError(f"{source} is no folder")
    config, family, biased = read_config(read_json(folder / "config.json"))
    config, weights = open_weights(folder, config, family, biased)
    return Model(folder, config, weights)
