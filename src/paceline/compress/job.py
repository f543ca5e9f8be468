"""Compress a checkpoint into a folder: resumable, one block in memory at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import paceline
from paceline.compress.base import MATRICES, Statistic, Statistics
from paceline.compress.checkpoint import Size, Target, is_compressed, write_checkpoint
from paceline.compress.work_folder import WorkFolder
from paceline.errors import MethodError, ModelError, RequestError

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.compress.calibrate import Calibration
    from paceline.compress.pipeline import CompressedBlock
    from paceline.compress.recipe import Recipe
    from paceline.compress.restructure import Restructured
    from paceline.compress.whole_model import WholeModel
    from paceline.models import Model


@dataclass
class CompressionJob:
    """The compression of one checkpoint; everything is checked before the work begins.

    Args:
        model: the source.
        out: the folder to write.
        recipe: what becomes of each matrix.
        again: compress a checkpoint that is stored in few bits already.

    Raises:
        RequestError: the target exists, or the source is compressed already.
        ModelError: a checkpoint cannot describe the model.
        MethodError: a rule of the recipe matches nothing.
    """

    model: Model
    out: Path
    recipe: Recipe
    again: bool = False

    def __post_init__(self) -> None:
        """Check source and target."""
        self._structure_notes: tuple[str, ...] = ()
        self._check_target()
        if not self.out.parent.is_dir():
            raise RequestError(f"cannot write {self.out}: there is no folder {self.out.parent}")
        if not self.again and is_compressed(self.model):
            raise RequestError(
                f"{self.model.name} is stored in few bits already, so that rounding it once more "
                "loses twice; take the original checkpoint, or add --again"
            )
        self._check_rules()
        self._target = Target.of(self.model, self.recipe)

    def _check_target(self) -> None:
        """Refuse to write over something."""
        if self.out.is_file() or (self.out.is_dir() and any(self.out.iterdir())):
            raise RequestError(f"{self.out} exists already; name a new folder")

    def _check_rules(self) -> None:
        """Refuse rules that would be ignored: those that no matrix falls under."""
        names = [
            name
            for name in self.model.weights
            if name.startswith("layers.") and name.rpartition(".")[2] in MATRICES
        ]
        used = {self.recipe.rule_of(name) for name in names}
        for place, (pattern, _) in enumerate(self.recipe.rules):
            if place not in used:
                raise MethodError(
                    f"no matrix falls under the rule for {pattern!r}; names are such as "
                    f"{names[0]}, and the first rule that matches one counts"
                )

    def _check_block(self, block: CompressedBlock) -> None:
        """Refuse a block that cannot be written, before it is kept."""

    @property
    def notes(self) -> list[str]:
        """Return in sentences where a method has to make another form than it was asked for."""
        weights = self.model.weights
        names = [
            f"layers.{index}.{part}"
            for index in range(len(self.model.config.layers))
            for part in MATRICES
        ] + ["embed", "head"]
        shapes = {name: weights.shape(name) for name in names if name in weights}
        matrices = {name: (shape[0], shape[1]) for name, shape in shapes.items()}
        return [*self._structure_notes, *self.recipe.notes(matrices, self.model.config)]

    @property
    def work_path(self) -> Path:
        """Return where unfinished work is kept."""
        return self.out.with_name(f".{self.out.name}.partial")

    def run(self, texts: Calibration, tick: Callable[[int], None] = lambda done: None) -> Size:
        """Compress, or go on where an earlier run was interrupted.

        Args:
            texts: for calibration; the same at every run.
            tick: called with the number of blocks that have been finished.

        Returns:
            the sizes of what was written.

        Raises:
            RequestError: another job was interrupted at this target.
            ModelError, MethodError: a block cannot be compressed or written.
        """
        with WorkFolder(self.work_path, self._describe(texts)) as work:
            return self._run(work, texts, tick)

    def _run(self, work: WorkFolder, texts: Calibration, tick: Callable[[int], None]) -> Size:
        from paceline.compress.pipeline import compress_blocks

        source = self._restructure(work, texts)
        self._structure_notes = source.notes
        config, layer = source.model.config, source.model.layer
        layers = len(config.layers)
        done = work.finished(layers)
        tick(done + len(self.model.config.layers) - layers)
        if done < layers:
            gradients = self._gradients(work, source.model)
            inputs = work.hidden(done) if done else self._first_inputs(source, texts)
            found = compress_blocks(
                config, layer, inputs, self.recipe, done, gradients, source.shared, work.block
            )
            for block in found:
                self._check_block(block)
                work.save(block)
                tick(1)
        if self.recipe.model_tuner is not None and not work.is_tuned():
            self._tune(work, source.model)
        draft = work.path / "out"
        shutil.rmtree(draft, ignore_errors=True)
        target = self._target
        if self.recipe.structures:
            target = target.reshaped(self.model.config, source.kept, source.biases, config)
            target = target.sharing({at: each.source for at, each in source.shared.items()})
        outer = self._new_outer(source)
        size = write_checkpoint(draft, self.model, self.recipe, target, work, layers, outer)
        size = self._finish(draft, size)
        work.remove()
        return size

    def _finish(self, draft: Path, size: Size) -> Size:
        """Give the finished folder its name; return the sizes of what is there."""
        try:
            draft.replace(self.out)
        except OSError as error:
            raise ModelError(f"cannot write {self.out}: {error.strerror or error}") from None
        return size

    def _describe(self, texts: Calibration) -> Mapping[str, object]:
        return {
            "model": self.model.fingerprint(),
            "recipe": str(self.recipe),
            "calibration": texts.digest(),
            "version": paceline.__version__,
        }

    def _restructure(self, work: WorkFolder, texts: Calibration) -> Restructured:
        """Return the model whose blocks are compressed, after the recipe's structures."""
        from paceline.compress.restructure import Restructured

        whole = self.recipe.structures or self.recipe.wanted_of_gradients or self.recipe.model_tuner
        base = self._base(texts, self._outer() if whole else {})
        source = Restructured.whole(base)
        for step, method in enumerate(self.recipe.structures):
            source = source.after(method, base, work.path, step)
        return source

    def _base(self, texts: Calibration, outer: Mapping[str, Tensor]) -> WholeModel:
        """Return the source as a model that can be run."""
        import torch

        from paceline.compress.whole_model import WholeModel

        tokens = torch.from_numpy(texts.tokens)
        return WholeModel(self.model.config, self._layer, outer, tokens)

    def _first_inputs(self, source: Restructured, texts: Calibration) -> Tensor:
        """Return what goes into the first block of what is compressed."""
        if self._new_outer(source):
            return source.model.embed(source.model.texts).contiguous()
        return self._embed(texts)

    def _new_outer(self, source: Restructured) -> dict[str, np.ndarray]:
        """Return the tensors outside the layers that structures made."""
        if not any(method.changes_hidden for method in self.recipe.structures):
            return {}
        return {name: each.numpy() for name, each in source.model.outer.items()}

    def _embed(self, texts: Calibration) -> Tensor:
        """Return what goes into the first block; only the rows that occur are read."""
        import torch

        from paceline.models import blocks

        used, places = np.unique(texts.tokens, return_inverse=True)
        embed = self.model.weights["embed"]
        outer = {"embed": torch.from_numpy(np.array(_rows(embed, used)))}
        if self.model.config.learned_positions:
            outer["positions"] = torch.from_numpy(np.array(self.model.weights.dense("positions")))
        tokens = torch.from_numpy(places.reshape(texts.tokens.shape))
        positions = torch.arange(tokens.shape[1])
        return blocks.embed(tokens, positions, self.model.config, outer).contiguous()

    def _gradients(
        self, work: WorkFolder, source: WholeModel
    ) -> Callable[[int, str], Statistics] | None:
        """Return what gradients say of each matrix, computed unless it is there already."""
        wanted = self.recipe.wanted_of_gradients
        if not wanted:
            return None
        extra = work.extra_bits()
        if extra is None:
            extra = self._keep_gradients(work, source, Statistic.FISHER in wanted)
        known = extra

        def read(index: int, name: str) -> Statistics:
            fisher = work.gradients(index, name) if Statistic.FISHER in wanted else None
            return Statistics(fisher=fisher, extra_bits=known[f"layers.{index}.{name}"])

        return read

    def _tune(self, work: WorkFolder, source: WholeModel) -> None:
        """Train all blocks together, and keep them."""
        from paceline.compress.reconstruct.distillation import CompressedModel

        assert self.recipe.model_tuner is not None
        layers = range(len(source.config.layers))
        model = CompressedModel(
            source.config,
            source.outer,
            [source.layer(index) for index in layers],
            [work.block(index) for index in layers],
            source.texts,
            bool(self.recipe.transforms),
            work.path,
        )
        work.keep_tuned(self.recipe.model_tuner.tune(model))

    def _outer(self) -> dict[str, Tensor]:
        """Return the float32 tensors outside the layers."""
        import torch

        return {
            name: torch.from_numpy(np.array(self.model.weights.dense(name)))
            for name in self.model.weights
            if not name.startswith("layers.")
        }

    def _keep_gradients(
        self, work: WorkFolder, source: WholeModel, fisher: bool
    ) -> dict[str, float]:
        """Compute gradients on the texts, and keep what they say of each matrix."""
        from paceline.compress.fisher import Gradients, extra_bits, loss_of_rounding

        losses, sizes = {}, {}
        passes = Gradients(source.config, source.layer, source.outer)
        for index, found in passes.fisher(source.texts):
            weights = source.layer(index)
            for name, each in found.items():
                full = f"layers.{index}.{name}"
                losses[full] = loss_of_rounding(weights[name], each)
                sizes[full] = each.numel()
            if fisher:
                work.keep_gradients(index, found)
        extra = extra_bits(losses, sizes)
        work.keep_extra_bits(extra)
        return extra

    def _layer(self, index: int) -> Mapping[str, Tensor]:
        """Return the float32 tensors of a layer."""
        import torch

        prefix, weights = f"layers.{index}.", self.model.weights
        tensors = {
            name.removeprefix(prefix): torch.from_numpy(np.array(weights.dense(name)))
            for name in weights
            if name.startswith(prefix)
        }
        weights.free_pages()  # layer by layer, all of the file would come to be in memory
        return tensors


def _rows(weight: object, index: np.ndarray) -> np.ndarray:
    from paceline.models.tensors import Linear

    if isinstance(weight, Linear):
        return weight.rows(index).dense()
    rows: np.ndarray = np.asarray(weight)[index]
    return rows
