"""Search widths, bits and dropped parts of every layer under a budget of time or bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from paceline.compress.allocate.base import Allocation, Problem
from paceline.compress.base import MATRICES
from paceline.compress.budget.kept_losses import KeptLosses
from paceline.compress.budget.module_levels import (
    Level,
    ShapeWords,
    modules,
    shape_recipe,
)
from paceline.compress.budget.search import BudgetSearch, Found, search_texts
from paceline.compress.checkpoint import outer_bytes
from paceline.compress.recipe import Recipe
from paceline.compress.structure.widths.slicing import check_sliceable
from paceline.compress.work_folder import WorkFolder
from paceline.errors import MethodError, RequestError

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.compress.budget.latency import LatencyTable, Tensors
    from paceline.compress.budget.module_loss import ModuleLoss
    from paceline.compress.budget.module_store import ModuleStore
    from paceline.compress.calibrate import Calibration
    from paceline.models.tensors import Linear

_ROWS = 8  # texts that forms are fitted on
_NANO = 1e9


@dataclass(frozen=True)
class Speed:
    """A budget of time.

    Attributes:
        value: tokens in a second, or times as many as the source makes.
        relative: whether it is times the source's.
    """

    value: float
    relative: bool


@dataclass
class ShapeSearch(BudgetSearch):
    """Searches the form of every attention and every MLP; see `BudgetSearch`.

    Attributes:
        words: what may become of shapes.
        speed: the budget, where it is one of time; `budget` counts otherwise.
        threads: of the engine whose times count.
    """

    words: ShapeWords = field(default=ShapeWords(), kw_only=True)
    speed: Speed | None = field(default=None, kw_only=True)
    threads: int | None = field(default=None, kw_only=True)

    _any_shapes = "shape:mlp=1"

    def __post_init__(self) -> None:
        """Check the recipes."""
        super().__post_init__()
        for recipe in self.levels:
            if recipe.wanted_of_gradients:
                raise MethodError(
                    f"{recipe.steps.text} looks at gradients of whole matrices, and a search of "
                    "shapes compresses narrower ones; name another method, e.g. gptq"
                )

    def find(self, texts: Calibration, tick: Callable[[int], None] = lambda done: None) -> Found:
        """Return the best recipe that was found; see `BudgetSearch.find`.

        Raises:
            RequestError: nothing fits the budget.
        """
        check_sliceable("--budget", self.model.config, self._layer(0))
        work = WorkFolder(self.search_path, self._describe(texts))
        store = self._modules(work, texts)
        store.build(lambda: _sensitivities(store), tick)
        units = modules(self.model.config)
        costs = [self._costs(store, index, name) for index, name in units]
        rows = [_pareto(each) for each in costs]
        pieces = search_texts(texts, self.allocator.max_tokens)
        judge = KeptLosses(
            work.path,
            lambda at, level: store.levels(*units[at]).index(rows[at][level][0]),
            lambda: self._judge(store, pieces),
        )
        problem = _problem(rows, self._room, judge)
        uniform = problem.uniform()
        found = self.allocator.search(problem, tick)
        tokens = self.allocator.max_tokens
        recipe = self._recipe_of([rows[at][level][0] for at, level in enumerate(found)])
        return Found(
            recipe,
            judge.loss(uniform, tokens),
            judge.loss(found, tokens),
            judge.evaluations,
            pieces.size,
            self._note(problem, found) + self.around.note(recipe.steps.text),
        )

    def _describe(self, texts: Calibration) -> Mapping[str, object]:
        words = [self.words.widths, self.words.attention, self.words.layers]
        return {**super()._describe(texts), "shapes": words}

    def _modules(self, work: WorkFolder, texts: Calibration) -> ModuleStore:
        from paceline.compress.budget.module_store import ModuleStore

        base = self._base(texts, self._outer())
        return ModuleStore(
            work.path, replace(base, texts=base.texts[:_ROWS]), self.words, self.levels
        )

    def _judge(self, store: ModuleStore, pieces: np.ndarray) -> ModuleLoss:
        import torch

        from paceline.compress.budget.module_loss import ModuleLoss

        source = replace(store.model, texts=torch.from_numpy(pieces))
        return ModuleLoss(source, store.dense, modules(self.model.config), store.levels)

    def _costs(self, store: ModuleStore, index: int, name: str) -> list[tuple[Level, int, float]]:
        """Return what each level of a module takes of the budget, and its estimated loss."""
        facts = store.facts(index, name)
        if self.speed is None:
            return facts
        return [
            (level, round(_NANO * store.seconds(index, name, level, self._table)), price)
            for level, _, price in facts
        ]

    @cached_property
    def _table(self) -> LatencyTable:
        from paceline.compress.budget.latency import LatencyTable

        config = self.model.config
        index = next(index for index, shape in enumerate(config.layers) if shape.heads)
        first = self._layer_as_stored(index)
        return LatencyTable(config, config.layers[index], first, self.threads)

    def _layer_as_stored(self, index: int) -> Tensors:
        """Return the tensors of a layer of the source as it holds them."""
        prefix = f"layers.{index}."
        return {
            name.removeprefix(prefix): self._stored(name)
            for name in self.model.weights
            if name.startswith(prefix)
        }

    @cached_property
    def _room(self) -> int:
        """Return what the budget leaves for the modules, in bytes or nanoseconds.

        Raises:
            RequestError: a pass without any layer takes longer.
        """
        if self.speed is None:
            return self.budget - outer_bytes(self.model, self.levels[0])
        rest = self._rest(self.levels[0])
        wanted = 1 / self.speed.value
        if self.speed.relative:
            wanted = self._source_seconds / self.speed.value
        if wanted <= rest:
            raise RequestError(
                f"embedding and head alone take {1e3 * rest:.2f} ms a token here, and the budget "
                f"is {1e3 * wanted:.2f} ms; ask for less, or give --head a recipe, e.g. "
                "rtn:bits=8,group=32"
            )
        return int(_NANO * (wanted - rest))

    @cached_property
    def _source_seconds(self) -> float:
        """Time of a token of the source, from the same table."""
        total = self._rest(None)
        for index, shape in enumerate(self.model.config.layers):
            stored = self._layer_as_stored(index)
            total += self._table.seconds(shape, stored, f"as in {self.model.fingerprint()}")
        return total

    def _rest(self, recipe: Recipe | None) -> float:
        """Return the time outside the layers, with a recipe's head or the source's own."""
        import torch

        from paceline.compress.base import Statistics

        outer: dict[str, Linear | np.ndarray] = {}
        for name in self.model.weights:
            if name.startswith("layers."):
                continue
            outer[name] = self._stored(name)
            if recipe is not None and recipe.head.compressors and name in ("embed", "head"):
                values = torch.from_numpy(np.array(self.model.weights.dense(name)))
                outer[name] = recipe.head.compress(values, Statistics())
        form = f"head {recipe.head.text if recipe else 'as in'} {self.model.fingerprint()}"
        return self._table.rest(outer, form)

    def _stored(self, name: str) -> Linear | np.ndarray:
        from paceline.models.tensors import Linear

        stored = self.model.weights.stored(name)
        return stored if isinstance(stored, Linear) else self.model.weights.dense(name)

    def _note(self, problem: Problem, found: Allocation) -> str:
        if self.speed is None:
            return ""
        rest = self._rest(self.levels[0])
        mine = rest + problem.bytes_of(found) / _NANO
        return (
            f" By the times of its parts on this machine a token takes {1e3 * mine:.2f} ms, of "
            f"which {1e3 * rest:.2f} ms outside the layers; with the source "
            f"{1e3 * self._source_seconds:.2f} ms."
        )

    def _recipe_of(self, chosen: Sequence[Level]) -> Recipe:
        """Return a recipe with the shapes, and rules for modules of other weights than most."""
        config = self.model.config
        units = modules(config)
        usual = Counter(level.recipe for level in chosen if level.units).most_common(1)[0][0]
        shapes = shape_recipe(config, [level.units for level in chosen])
        left = sorted(
            {index for (index, _), level in zip(units, chosen, strict=True) if level.units}
        )
        rules = []
        for (index, name), level in zip(units, chosen, strict=True):
            if level.units and level.recipe != usual:
                parts = ("q", "k", "v", "o") if name == "o" else ("gate", "up", "down")
                rules += [
                    (f"layers.{left.index(index)}.{part}", self.levels[level.recipe].steps)
                    for part in parts
                    if part in MATRICES and f"layers.{index}.{part}" in self.model.weights
                ]
        return replace(self._with_around(self.levels[usual], shapes), rules=tuple(rules))


def _sensitivities(store: ModuleStore) -> Sequence[Mapping[str, Tensor]]:
    from paceline.compress.structure.widths.sensitivity import output_sensitivities

    return output_sensitivities(store.model, _ROWS)


def _pareto(levels: Sequence[tuple[Level, int, float]]) -> list[tuple[Level, int, float]]:
    """Return the levels, the cheapest first, that lose less than all cheaper ones."""
    kept: list[tuple[Level, int, float]] = []
    for level in sorted(levels, key=lambda each: (each[1], each[2])):
        if not kept or (level[2] < kept[-1][2] and level[1] > kept[-1][1]):
            kept.append(level)
    return kept


def _problem(
    rows: Sequence[Sequence[tuple[Level, int, float]]], room: int, judge: KeptLosses
) -> Problem:
    """Return the problem of modules with levels of their own."""
    width = max(map(len, rows))
    sizes = np.array([[row[min(at, len(row) - 1)][1] for at in range(width)] for row in rows])
    prices = np.array([[row[min(at, len(row) - 1)][2] for at in range(width)] for row in rows])
    ends = tuple(len(row) - 1 for row in rows)
    return Problem(sizes, prices, room, judge.loss, ends, judge.trained_loss)
