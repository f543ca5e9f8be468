"""What every module stores at every level, what it loses, and how long it takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paceline.compress.budget.latency import LatencyTable, Tensors
from paceline.compress.budget.module_levels import (
    Level,
    ShapeWords,
    module_of,
    modules,
    shape_with,
)
from paceline.compress.pipeline import compress_blocks
from paceline.compress.recipe import Recipe
from paceline.compress.structure.base import kept_tensors
from paceline.compress.structure.widths.moments import Moments
from paceline.compress.structure.widths.refitted import cut_and_refit, unit_inputs, units_in
from paceline.compress.structure.widths.removal import removal
from paceline.compress.whole_model import WholeModel, run_frozen
from paceline.models.config import LayerConfig
from paceline.models.formats.packed import Packed
from paceline.models.formats.safetensors import Stored, read_file
from paceline.models.formats.stored_forms import StoredForms, arrays_of
from paceline.models.formats.writer import write_arrays, write_json
from paceline.models.tensors import Dense, Linear, narrowest

_MISSING = 1e-12  # what a level loses at least, so that estimates can be compared


@dataclass(frozen=True)
class ModuleStore:
    """Forms of the attention and the MLP of every layer, each made as if the others were whole.

    Attributes:
        folder: of the files.
        model: the source, with the texts that forms are fitted on.
        words: what may become of the shapes.
        recipes: of the weights.
    """

    folder: Path
    model: WholeModel
    words: ShapeWords
    recipes: Sequence[Recipe]

    def levels(self, index: int, name: str) -> list[Level]:
        """Return the levels of a module, the whole one first."""
        return self.words.levels(self.model.config.layers[index], name, len(self.recipes))

    def build(
        self,
        sensitivities: Callable[[], Sequence[Mapping[str, Tensor]]],
        tick: Callable[[int], None],
    ) -> None:
        """Make the forms that are not there yet.

        Args:
            sensitivities: returns how much errors of the outputs of each part cost.
            tick: called with the number of layers that have been finished.
        """
        config, weigh = self.model.config, None
        x = self.model.embed(self.model.texts)
        for index, shape in enumerate(config.layers):
            middle = x
            for name in [each for layer, each in modules(config) if layer == index]:
                inputs = x if config.parallel or name == "o" else middle
                if not self._facts(index, name).is_file():
                    weigh = weigh or sensitivities()
                    self._build_module(index, name, inputs, weigh[index][name])
                if name == "o":
                    middle = run_frozen(config, module_of(shape, "o"), self.model.layer(index), x)
            x = self.model.run(index, x)
            tick(1)

    def _build_module(self, index: int, name: str, x: Tensor, weigh: Tensor) -> None:
        """Make the forms of a module for inputs x [B, T, hidden] of its layer."""
        whole = module_of(self.model.config.layers[index], name)
        weights = kept_tensors(self.model.layer(index), whole)
        moments = Moments()
        right = run_frozen(self.model.config, whole, weights, x, moments.tap())
        facts = []
        forms = self._narrowed(index, name, whole, weights, moments.moment(name), weigh)
        for units, shape, tensors in forms:
            for place in range(len(self.recipes) if units else 1):
                size, error = 0, x - right
                if units:
                    size, outputs = self._compress(index, name, shape, tensors, x, units, place)
                    error = outputs - right
                flat = error.flatten(0, 1)
                price = float(((flat @ weigh) * flat).sum()) / 2 / len(flat)
                facts.append([units, place, size, max(price, _MISSING)])
        write_json(self._facts(index, name), {"levels": facts})

    def _narrowed(
        self,
        index: int,
        name: str,
        whole: LayerConfig,
        weights: Mapping[str, Tensor],
        moment: Tensor,
        weigh: Tensor,
    ) -> Iterator[tuple[int, LayerConfig, Mapping[str, Tensor]]]:
        """Yield the units, the shape and the tensors of a module of each size."""
        count = units_in(whole, name)
        sizes = list(dict.fromkeys(level.units for level in self.levels(index, name)))
        smallest = min((size for size in sizes if size), default=count)
        order = None
        if smallest < count:
            size = unit_inputs(whole, name)
            order = removal(weights[name], moment, weigh / 2, size, count - smallest).order
        for units in sizes:
            if units in (0, count) or order is None:
                yield units, whole, weights
                continue
            gone = order[: count - units]
            shape, made = cut_and_refit(weights, whole, name, gone, moment)
            yield units, shape, {**weights, **made}

    def _compress(
        self,
        index: int,
        name: str,
        shape: LayerConfig,
        tensors: Mapping[str, Tensor],
        x: Tensor,
        units: int,
        place: int,
    ) -> tuple[int, Tensor]:
        """Write a form of a module; return its bytes, and its outputs for inputs x."""
        layers = list(self.model.config.layers)
        layers[index] = shape
        config = replace(self.model.config, layers=tuple(layers))
        recipe = replace(self.recipes[place], rules=())
        block = next(compress_blocks(config, lambda _: tensors, x, recipe, index))
        arrays: dict[str, tuple[str, NDArray[Any]]] = {}
        for each, form in block.tensors.items():
            if isinstance(form, torch.Tensor) and form.dim() == 2:
                form = narrowest(form.numpy())
            stored = form if isinstance(form, Linear) else form.numpy()
            arrays |= arrays_of(f"layers.{index}.{each}", stored)
        write_arrays(self._file(index, name, Level(units, place)), arrays)
        return sum(values.nbytes for _, values in arrays.values()), block.outputs

    def facts(self, index: int, name: str) -> list[tuple[Level, int, float]]:
        """Return each level of a module with its bytes, and what it is estimated to lose."""
        read = json.loads(self._facts(index, name).read_text(encoding="utf-8"))["levels"]
        return [(Level(units, place), size, float(price)) for units, place, size, price in read]

    def stored(self, index: int, name: str, level: Level) -> Tensors:
        """Return the tensors of a module in their stored form; none where it is gone."""
        if not level.units:
            return {}
        file = self._file(index, name, level)
        found: dict[str, Linear | np.ndarray] = {}
        for full, each in StoredForms().collect(file, read_file(file)).items():
            short = full.split(".", 2)[2]
            if isinstance(each, Packed):
                found[short] = each.read()
            else:
                assert isinstance(each, Stored)
                values = np.array(each.values)
                found[short] = Dense(values, each.dtype) if values.ndim == 2 else values
        return found

    def dense(self, index: int, name: str, level: Level) -> dict[str, Tensor]:
        """Return the tensors of a module as float32."""
        return {
            short: torch.from_numpy(
                np.array(each.dense() if isinstance(each, Linear) else each, np.float32)
            )
            for short, each in self.stored(index, name, level).items()
        }

    def seconds(self, index: int, name: str, level: Level, table: LatencyTable) -> float:
        """Return the time of a module at a level."""
        shape = shape_with(module_of(self.model.config.layers[index], name), name, level.units)
        form = str(self.recipes[level.recipe].steps.text)
        return table.seconds(shape, self.stored(index, name, level), form)

    def _facts(self, index: int, name: str) -> Path:
        return self.folder / f"module-{index:04}-{name}.json"

    def _file(self, index: int, name: str, level: Level) -> Path:
        units, place = level
        return self.folder / f"module-{index:04}-{name}-{units}-{place}.safetensors"
