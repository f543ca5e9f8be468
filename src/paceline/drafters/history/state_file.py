"""A drafter's learned state in a safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.core import State
from paceline.models.formats.safetensors import read_file
from paceline.models.formats.writer import Pending, type_name, write_safetensors


def write_learnt(path: Path, state: State) -> None:
    """Write what `Drafter.state()` returned.

    Raises:
        ModelError: the file cannot be written.
    """

    def pending(array: NDArray[Any]) -> Pending:
        return Pending(array.shape, lambda: array, type_name(array.dtype))

    write_safetensors(path, {name: pending(array) for name, array in state.items()})


def read_learnt(path: Path) -> State:
    """Read what `write_learnt` wrote, for `Drafter.load()`, which checks it.

    Raises:
        ModelError: the file cannot be read, or is damaged.
    """
    return {name: np.array(stored.values) for name, stored in read_file(path).items()}
