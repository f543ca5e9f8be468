"""Compress a model block by block: calibrate each on the outputs of those compressed before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paceline.compress.base import GROUPS, MATRICES, OF_GRADIENTS, Block, Statistic, Statistics
from paceline.compress.kronecker import Kronecker
from paceline.compress.recipe import Recipe
from paceline.compress.shared_blocks import shared_block
from paceline.errors import ModelError
from paceline.models import blocks
from paceline.models.config import LayerConfig, ModelConfig
from paceline.models.rounding import rounded_product
from paceline.models.tensors import Linear, RoundedInputs, narrowest

if TYPE_CHECKING:
    from paceline.compress.restructure import SharedLayer

_TOGETHER = 1024  # positions that run through a block at once; caches hold more of fewer


@dataclass(frozen=True)
class CompressedBlock:
    """A compressed block.

    Attributes:
        index: of the layer.
        tensors: stored matrices and float32 vectors by their names in the layer, e.g. `q`.
        outputs: float32 [B, T, hidden] of the compressed block, the inputs of the next.
    """

    index: int
    tensors: Mapping[str, Linear | Tensor]
    outputs: Tensor


def compress_blocks(
    config: ModelConfig,
    layer: Callable[[int], Mapping[str, Tensor]],
    inputs: Tensor,
    recipe: Recipe,
    start: int = 0,
    gradients: Callable[[int, str], Statistics] | None = None,
    shared: Mapping[int, SharedLayer] = MappingProxyType({}),
    finished: Callable[[int], Mapping[str, Linear | Tensor]] | None = None,
) -> Iterator[CompressedBlock]:
    """Compress every matrix of the decoder blocks, in order.

    The error of earlier blocks reaches the calibration of later ones. One block's tensors are in
    memory at a time, besides the hidden states of the calibration texts.

    Args:
        config: the model's shape.
        layer: reads the float32 tensors of a layer by its index.
        inputs: float32 [B, T, hidden], what goes into the block `start`; see `blocks.embed`.
        recipe: what becomes of each matrix.
        start: the first block.
        gradients: returns what gradients say of a matrix, by the index of its layer and its name;
            None where the recipe asks for none of that.
        shared: blocks that have the matrices of others as these are stored.
        finished: reads what is stored of a block before; needed where any are shared.

    Raises:
        ModelError: a weight, an input of a matrix or an output is no number.
        MethodError: a method does not fit a matrix.
    """
    x = inputs
    for index in range(start, len(config.layers)):
        weights = dict(layer(index))
        _check_finite(index, weights)
        runner = _Runner(config, config.layers[index], x.shape[1])
        if index in shared:
            assert finished is not None, "blocks are kept"
            block_of = shared_block(index, weights, shared[index], finished(shared[index].source))
            x = _outputs(runner, index, block_of[1], x)
            yield CompressedBlock(index, block_of[0], x)
            continue
        matrices = [name for name in MATRICES if name in weights]
        bases: dict[str, Kronecker] = {}
        block = Block(index, config, runner.shape, weights, {}, x, runner, bases)
        wanted = recipe.wanted(f"layers.{index}.{name}" for name in matrices) - OF_GRADIENTS
        stats = _transform(block, recipe, wanted)
        if gradients is not None:
            stats |= _with_gradients(stats, {name: gradients(index, name) for name in matrices})
        block = replace(block, stats=stats)
        stored = _compress(block, recipe, matrices)
        for tuner in recipe.tuners:
            stored |= tuner.tune(block, stored)
        weights |= {name: torch.from_numpy(each.dense()) for name, each in stored.items()}
        tensors: dict[str, Linear | Tensor] = {**weights, **stored}
        if recipe.structures:
            rest = {name: weights[name] for name in matrices if name not in stored}
            tensors |= {name: narrowest(each.numpy()) for name, each in rest.items()}
        products = {
            name: rounded_product(each, weights[name])
            for name, each in stored.items()
            if isinstance(each, RoundedInputs)
        }
        del block, stats  # second moments, and what was made of them
        x = _outputs(runner, index, {**weights, **products}, x)
        yield CompressedBlock(index, tensors, x)


@torch.no_grad()
def _outputs(runner: _Runner, index: int, weights: blocks.LayerWeights, x: Tensor) -> Tensor:
    """Return the outputs of a block.

    Raises:
        ModelError: they are no numbers.
    """
    x = runner.outputs(weights, x)
    if not bool(torch.isfinite(x).all()):
        raise ModelError(
            f"block {index} puts out values that are no numbers on the calibration texts; the "
            "checkpoint or the recipe is unsound"
        )
    return x


def _transform(block: Block, recipe: Recipe, wanted: frozenset[Statistic]) -> dict[str, Statistics]:
    """Transform a block, and return what is wanted of the inputs of its matrices afterwards.

    Texts run through the block once where all transforms keep the statistics true.
    """
    runner, weights, x = block.run, block.weights, block.inputs
    assert isinstance(runner, _Runner)
    seen = frozenset().union(*(each.statistics for each in recipe.transforms))
    once = all(each.rescales for each in recipe.transforms)
    stats: dict[str, Statistics] = {}
    for place, transform in enumerate(recipe.transforms):
        if not (once and place):
            both = seen | wanted if once else seen
            stats = _checked(block.index, runner.statistics(weights, x, both, block.bases))
        transform.transform(replace(block, stats=stats), recipe.steps.compressors[-1])
    if once and recipe.transforms:
        return stats
    return _checked(block.index, runner.statistics(weights, x, wanted, block.bases))


@torch.no_grad()
def _compress(block: Block, recipe: Recipe, names: Sequence[str]) -> dict[str, Linear]:
    """Return the stored forms of the matrices that the recipe does not keep.

    Args:
        block: with the statistics that the methods want.
        recipe: what becomes of each matrix.
        names: of the matrices.
    """
    bases = block.bases
    weights = {
        name: bases[name].into(block.weights[name]) if name in bases else block.weights[name]
        for name in names
    }
    stored = {}
    for name, shared in recipe.for_block(block.index, weights, block.stats).items():
        steps = shared.for_matrix(f"layers.{block.index}.{name}", block.config)
        if steps.compressors:
            form = steps.compress(weights[name], block.stats[name])
            form = bases[name].wrap(form) if name in bases else form
            stored[name] = block.ranges[name].wrap(form) if name in block.ranges else form
    return stored


def _check_finite(index: int, weights: Mapping[str, Tensor]) -> None:
    """Refuse a layer whose weights are no numbers: decompositions of them would not end."""
    for name, each in weights.items():
        if not bool(each.isfinite().all()):
            raise ModelError(
                f"layers.{index}.{name} holds NaN or infinite weights, expected numbers; download "
                "the checkpoint again"
            )


def _with_gradients(
    stats: Mapping[str, Statistics], seen: Mapping[str, Statistics]
) -> dict[str, Statistics]:
    """Return statistics of inputs with what gradients say of the matrices."""
    return {
        name: replace(stats[name], fisher=each.fisher, extra_bits=each.extra_bits)
        for name, each in seen.items()
    }


def _checked(index: int, stats: dict[str, Statistics]) -> dict[str, Statistics]:
    """Return statistics, and refuse those of inputs that are no numbers, or whose squares are none.

    Raises:
        ModelError: names the matrix.
    """
    for name, each in stats.items():
        for measured in (each.input_norm, each.second_moment):
            if measured is not None and not _is_finite(measured):
                raise ModelError(
                    f"the inputs of layers.{index}.{name} are no numbers on the calibration "
                    "texts; the checkpoint or the recipe is unsound"
                )
    return stats


def _is_finite(x: Tensor) -> bool:
    """Return whether all numbers are finite; nothing as large as `x` is made."""
    return all(bool(end.isfinite()) for end in torch.aminmax(x))


def _zeros(width: int, x: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:-1], width)


class _Runner:
    """Runs one block over calibration texts, some at a time."""

    def __init__(self, config: ModelConfig, shape: LayerConfig, length: int) -> None:
        positions = torch.arange(length)
        self._config, self.shape = config, shape
        self._mask = blocks.causal_mask(positions, shape)
        self._rotation = blocks.rotation_of(shape, positions)
        self._step = max(1, _TOGETHER // length)

    def __call__(
        self, weights: blocks.LayerWeights, x: Tensor, tap: blocks.Tap | None = None
    ) -> Tensor:
        return blocks.block(
            x, self._config, self.shape, weights, self._mask, self._rotation, tap=tap
        )

    def outputs(self, weights: blocks.LayerWeights, x: Tensor) -> Tensor:
        """Return the outputs [B, T, hidden] of all texts."""
        found = torch.empty_like(x)
        for into, part in zip(*(torch.split(each, self._step) for each in (found, x)), strict=True):
            into.copy_(self(weights, part))
        return found

    @torch.no_grad()
    def statistics(
        self,
        weights: Mapping[str, Tensor],
        x: Tensor,
        wanted: frozenset[Statistic],
        bases: Mapping[str, Kronecker] = MappingProxyType({}),
    ) -> dict[str, Statistics]:
        """Return what is wanted of the inputs of each matrix, which `bases` transform first."""
        groups = [[name for name in group if name in weights] for group in GROUPS]
        found = {group[0]: Statistics() for group in groups if group}
        run: blocks.LayerWeights = weights
        if "down" in weights:  # its product is the output, which is not looked at
            run = {**weights, "down": partial(_zeros, len(weights["down"]))}
        if wanted:

            def tap(name: str, seen: Tensor) -> None:
                if name in found:
                    seen = bases[name].inputs(seen) if name in bases else seen
                    found[name] = found[name].plus(seen, wanted)

            for part in torch.split(x, self._step):  # outputs are not kept
                self(run, part, tap)
        return {name: found[group[0]] for group in groups for name in group}
