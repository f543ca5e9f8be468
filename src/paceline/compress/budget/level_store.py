"""What every level stores of every matrix, in files beside the target."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paceline.compress.base import MATRICES, Statistics
from paceline.compress.pipeline import compress_blocks
from paceline.compress.recipe import Recipe, Steps
from paceline.models.formats.packed import Packed
from paceline.models.formats.safetensors import Stored, read_file
from paceline.models.formats.stored_forms import StoredForms, arrays_of
from paceline.models.formats.writer import write_arrays, write_json
from paceline.models.tensors import Linear

if TYPE_CHECKING:
    from paceline.models.config import ModelConfig


@dataclass(frozen=True)
class LevelStore:
    """Compressed forms of all matrices at all levels.

    Every block is compressed as it is in the source: on the outputs of blocks that are not
    compressed, so that levels of different blocks go together.

    Attributes:
        folder: of the files; one for each block and level.
        config: the model's shape.
        layer: reads the float32 tensors of a layer by its index.
        levels: their recipes.
    """

    folder: Path
    config: ModelConfig
    layer: Callable[[int], Mapping[str, Tensor]]
    levels: Sequence[Recipe]

    def build(
        self,
        inputs: Tensor,
        gradients: Callable[[int, str], Statistics] | None,
        fisher: Callable[[int, str], Tensor],
        tick: Callable[[int], None],
    ) -> None:
        """Compress what is not there yet.

        Args:
            inputs: float32 [B, T, hidden], what goes into the first block.
            gradients: as of `compress_blocks`.
            fisher: returns the Fisher information of a matrix [out, in] by layer and name.
            tick: called with the number of blocks that have been finished.
        """
        x = inputs
        for index in range(len(self.config.layers)):
            if not self._prices(index).is_file():
                prices = {}
                for level, recipe in enumerate(self.levels):
                    block = next(
                        compress_blocks(self.config, self.layer, x, recipe, index, gradients)
                    )
                    stored = {
                        name: each for name, each in block.tensors.items() if name in MATRICES
                    }
                    prices[level] = self._keep(index, level, stored, fisher)
                write_json(self._prices(index), {"prices": prices})
            if index + 1 < len(self.config.layers):
                plain = Recipe(Steps())
                x = next(compress_blocks(self.config, self.layer, x, plain, index)).outputs
            tick(1)

    def _keep(
        self,
        index: int,
        level: int,
        stored: Mapping[str, Linear | Tensor],
        fisher: Callable[[int, str], Tensor],
    ) -> dict[str, list[float]]:
        """Write the matrices of a block at a level; return bytes and estimated loss of each."""
        weights, facts = self.layer(index), {}
        arrays: dict[str, tuple[str, NDArray[Any]]] = {}
        for name, form in stored.items():
            one = arrays_of(
                f"layers.{index}.{name}", form if isinstance(form, Linear) else form.numpy()
            )
            dense = torch.from_numpy(form.dense()) if isinstance(form, Linear) else form
            errors = (dense - weights[name]).square()
            loss = float((fisher(index, name).double() * errors).sum()) / 2
            facts[name] = [float(sum(values.nbytes for _, values in one.values())), loss]
            arrays |= one
        write_arrays(self._file(index, level), arrays)
        return facts

    def names(self) -> list[tuple[int, str]]:
        """Return the layer and the name in it of every matrix, in order."""
        facts = [self._read(index)["0"] for index in range(len(self.config.layers))]
        return [
            (index, name) for index, each in enumerate(facts) for name in MATRICES if name in each
        ]

    def facts(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return bytes and estimated losses of all matrices and levels, [matrices, levels]."""
        read = {index: self._read(index) for index in range(len(self.config.layers))}
        values = [
            [read[index][str(level)][name] for level in range(len(self.levels))]
            for index, name in self.names()
        ]
        table = np.array(values)
        return table[..., 0].astype(np.int64), table[..., 1]

    def dense(self, index: int, name: str, level: int) -> Tensor:
        """Return a matrix at a level, float32 [out, in]."""
        file = self._file(index, level)
        full = f"layers.{index}.{name}"
        parts = {
            key: each for key, each in read_file(file).items() if key.partition(":")[0] == full
        }
        form = StoredForms().collect(file, parts)[full]
        if isinstance(form, Packed):
            return torch.from_numpy(form.read().dense())
        assert isinstance(form, Stored)
        return torch.from_numpy(np.array(form.values))

    def _read(self, index: int) -> dict[str, dict[str, list[float]]]:
        found: dict[str, dict[str, list[float]]] = json.loads(self._prices(index).read_text())[
            "prices"
        ]
        return found

    def _file(self, index: int, level: int) -> Path:
        return self.folder / f"block-{index:04}-level-{level:02}.safetensors"

    def _prices(self, index: int) -> Path:
        return self.folder / f"block-{index:04}.json"
