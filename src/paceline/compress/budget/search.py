"""Search for the recipe of each matrix so that a checkpoint fits into a budget of bytes."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from paceline.compress.allocate.base import Allocator, Problem
from paceline.compress.base import MATRICES, Statistics
from paceline.compress.budget.around import Around
from paceline.compress.budget.kept_losses import KeptLosses
from paceline.compress.checkpoint import outer_bytes
from paceline.compress.job import CompressionJob
from paceline.compress.recipe import Recipe, parse_steps
from paceline.compress.work_folder import WorkFolder

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.compress.budget.level_loss import LevelLoss
    from paceline.compress.budget.level_store import LevelStore
    from paceline.compress.calibrate import Calibration

_TEXT = 256  # tokens of a text that allocations are judged on


@dataclass(frozen=True)
class Found:
    """A recipe with rules for single matrices, and what the search saw.

    Attributes:
        recipe: of every matrix.
        uniform: divergence from the source with the same level everywhere, in nats a token.
        loss: divergence with the recipe that was found.
        evaluations: different allocations and numbers of tokens that were judged.
        tokens: that both losses are of.
        more: further sentences for the card.
    """

    recipe: Recipe
    uniform: float
    loss: float
    evaluations: int
    tokens: int
    more: str = ""

    @property
    def toml(self) -> str:
        """Return the recipe as a file that `--recipe` takes."""
        values = [f"recipe = {json.dumps(self.recipe.steps.text)}"]
        if self.recipe.head.compressors:
            values.append(f"head = {json.dumps(self.recipe.head.text)}")
        for pattern, steps in self.recipe.rules:
            rule = f"match = {json.dumps(pattern)}", f"recipe = {json.dumps(steps.text)}"
            values += ["", "[[rule]]", *rule]
        return "\n".join(values) + "\n"

    @property
    def note(self) -> str:
        """Return what the card tells, a sentence."""
        return (
            f"Searched in {self.evaluations} evaluations: on {self.tokens} tokens of calibration "
            f"texts the divergence from the source is {self.loss:.4f} nats a token, and "
            f"{self.uniform:.4f} with the same level everywhere.{self.more}"
        )


@dataclass
class BudgetSearch(CompressionJob):
    """Searches the levels of single matrices; see `CompressionJob` for the source and the target.

    The forms of all levels and the losses of allocations lie in a folder beside the target, so that
    an interrupted search goes on.

    Attributes:
        levels: recipes, of which every matrix takes one; `recipe` is one of them.
        budget: bytes of the whole checkpoint's tensors.
        allocator: chooses.
        around: methods that the recipe has beside its levels, which are judged without them.
    """

    levels: Sequence[Recipe] = field(default=(), kw_only=True)
    budget: int = field(kw_only=True)
    allocator: Allocator = field(kw_only=True)
    around: Around = field(default=Around(), kw_only=True)

    _any_shapes: ClassVar[str] = ""  # some shapes that the search may find, to try recipes with

    def __post_init__(self) -> None:
        """Check the source, the target and every recipe that the search may find."""
        super().__post_init__()
        for level in self.levels:
            self._with_around(level, self._any_shapes)

    @property
    def search_path(self) -> Path:
        """Return where levels and losses are kept."""
        return self.out.with_name(f".{self.out.name}.search")

    @property
    def steps(self) -> int:
        """About how many ticks a search takes."""
        return len(self.model.config.layers) + self.allocator.evaluations

    def find(self, texts: Calibration, tick: Callable[[int], None] = lambda done: None) -> Found:
        """Return the best recipe that was found; `finish` removes what the search kept.

        Args:
            texts: for calibration, and for the losses of allocations; the same at every run.
            tick: called with the number of blocks and evaluations that have been finished.

        Raises:
            RequestError: nothing fits the budget, or another search was interrupted at this target.
            ModelError, MethodError: as of `CompressionJob`.
        """
        with WorkFolder(self.search_path, self._describe(texts)) as work:
            return self._find(work, texts, tick)

    def _find(self, work: WorkFolder, texts: Calibration, tick: Callable[[int], None]) -> Found:
        store = self._store(work, texts, tick)
        names = store.names()
        sizes, prices = store.facts()
        chosen = _worthwhile(sizes, prices)
        fixed = outer_bytes(self.model, self.recipe) + self._vector_bytes()
        pieces = search_texts(texts, self.allocator.max_tokens)
        judge = KeptLosses(
            work.path, lambda at, level: chosen[level], lambda: self._loss(store, names, pieces)
        )
        problem = Problem(
            sizes[:, chosen],
            prices[:, chosen],
            self.budget - fixed,
            judge.loss,
            trained_loss=judge.trained_loss,
        )
        uniform = problem.uniform()
        found = self.allocator.search(problem, tick)
        tokens = self.allocator.max_tokens
        recipe = self._recipe([self.levels[chosen[level]] for level in found], names)
        return Found(
            recipe,
            judge.loss(uniform, tokens),
            judge.loss(found, tokens),
            judge.evaluations,
            pieces.size,
            self.around.note(recipe.steps.text),
        )

    def finish(self) -> None:
        """Remove what the search kept."""
        shutil.rmtree(self.search_path, ignore_errors=True)

    def _describe(self, texts: Calibration) -> Mapping[str, object]:
        levels = [str(each) for each in self.levels]
        return {**super()._describe(texts), "recipe": levels}

    def _store(
        self, work: WorkFolder, texts: Calibration, tick: Callable[[int], None]
    ) -> LevelStore:
        from paceline.compress.budget.level_store import LevelStore

        if work.extra_bits() is None:
            self._keep_gradients(work, self._base(texts, self._outer()), True)
        extra = work.extra_bits()
        assert extra is not None
        known: Mapping[str, float] = extra

        def gradients(index: int, name: str) -> Statistics:
            full = f"layers.{index}.{name}"
            return Statistics(fisher=work.gradients(index, name), extra_bits=known[full])

        wanted = any(each.wanted_of_gradients for each in self.levels)
        store = LevelStore(work.path, self.model.config, self._layer, self.levels)
        store.build(self._embed(texts), gradients if wanted else None, work.gradients, tick)
        return store

    def _loss(
        self, store: LevelStore, names: list[tuple[int, str]], pieces: NDArray[np.int64]
    ) -> LevelLoss:
        import torch

        from paceline.compress.budget.level_loss import LevelLoss
        from paceline.compress.whole_model import WholeModel

        source = WholeModel(self.model.config, self._layer, self._outer(), torch.from_numpy(pieces))
        return LevelLoss(source, store.dense, names)

    def _vector_bytes(self) -> int:
        """Return the bytes of norms and biases in the blocks, which are written as float32."""
        weights = self.model.weights
        vectors = [
            name
            for name in weights
            if name.startswith("layers.") and name.rpartition(".")[2] not in MATRICES
        ]
        return sum(4 * int(np.prod(weights.shape(name))) for name in vectors)

    def _recipe(self, levels: Sequence[Recipe], names: list[tuple[int, str]]) -> Recipe:
        """Return a recipe with the most frequent level for all, and rules for the others."""
        texts = [each.steps.text for each in levels]
        common = Counter(texts).most_common(1)[0][0]
        base = levels[texts.index(common)]
        rules = tuple(
            (f"layers.{index}.{name}", each.steps)
            for (index, name), each in zip(names, levels, strict=True)
            if each.steps.text != common
        )
        return replace(self._with_around(base), rules=rules)

    def _with_around(self, level: Recipe, shapes: str = "") -> Recipe:
        """Return the recipe of a level with shapes and the methods around."""
        return replace(level, steps=parse_steps(self.around.recipe(shapes, level.steps.text)))


def _worthwhile(sizes: NDArray[np.int64], prices: NDArray[np.float64]) -> list[int]:
    """Return the levels, by size, that take more bytes of every matrix and promise less loss."""
    order = np.lexsort((prices.sum(0), sizes.sum(0)))
    chosen = [int(order[0])]
    for level in order[1:]:
        last = chosen[-1]
        if (sizes[:, level] > sizes[:, last]).all() and prices[:, level].sum() < prices[
            :, last
        ].sum():
            chosen.append(int(level))
    return chosen


def search_texts(texts: Calibration, count: int) -> NDArray[np.int64]:
    """Return pieces of the calibration texts with so many tokens, [B, T], some of every kind."""
    tokens = texts.tokens
    length = min(_TEXT, tokens.shape[1])
    pieces = tokens[:, : tokens.shape[1] // length * length].reshape(-1, length)
    order = np.random.default_rng(0).permutation(len(pieces))
    return np.ascontiguousarray(pieces[order[: -(-count // length)]])
