"""The contracts of compression methods: what each wants to know, and what it makes of a block.

Six kinds of methods make a recipe, in this order: structures leave parts of the model out or train
what is left (`structure.base`), transforms rewrite the weights of a block without changing what it
computes, a pruner, one quantiser or factorisation, corrections of what that lost, and tuners, which
train the stored form on the outputs of the block or, all blocks together, on those of the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from paceline.abilities import Ability
from paceline.registry import Method

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.compress.input_range import InputRange
    from paceline.compress.kronecker import Kronecker
    from paceline.compress.reconstruct.distillation import CompressedModel
    from paceline.models.blocks import LayerWeights
    from paceline.models.config import LayerConfig, ModelConfig
    from paceline.models.tensors import Linear

# Matrices of a block; those of one group are multiplied with the same input.
GROUPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
MATRICES = tuple(name for group in GROUPS for name in group)


class Statistic(StrEnum):
    """Something that calibration can measure about the inputs of a matrix."""

    INPUT_NORM = "input norm"  # root of the sum of squares of each input channel
    SECOND_MOMENT = "second moment"  # sum of x x', the Hessian of the layer's squared error
    FISHER = "Fisher information"  # sum of the squared derivatives of the loss by each weight
    SENSITIVITY = "sensitivity"  # bits that the matrix should have more than others


_COLUMNS = 192  # of a second moment that are computed at once

# What needs gradients of the whole model.
OF_GRADIENTS = frozenset({Statistic.FISHER, Statistic.SENSITIVITY})


@dataclass(frozen=True)
class Statistics:
    """What calibration measured about the inputs x of one matrix; None where it was not asked for.

    Attributes:
        count: calibration positions.
        input_norm: float32 [in], the Euclidean norm of each channel over all positions.
        second_moment: float32 [in, in], the sum of x x' over all positions.
        fisher: float32 [out, in], the diagonal of the Fisher information of the weights as they
            were before any transform; see `fisher.Gradients`.
        extra_bits: by which the matrix should exceed the mean of all; see `fisher.extra_bits`.
        kept: bool [out, in], which weights a pruner left; None where none went before.
    """

    count: int = 0
    input_norm: Tensor | None = None
    second_moment: Tensor | None = None
    fisher: Tensor | None = None
    extra_bits: float | None = None
    kept: Tensor | None = None

    def plus(self, x: Tensor, wanted: frozenset[Statistic]) -> Statistics:
        """Return the statistics with further positions x [..., in].

        The second moment of this one is added to in place, and is part of the result.
        """
        import torch

        flat = x.detach().reshape(-1, x.shape[-1]).float()
        new = replace(self, count=self.count + len(flat))
        if Statistic.INPUT_NORM in wanted:
            squares = flat.square().sum(0)
            old = self.input_norm
            total = squares if old is None else old.square() + squares
            new = replace(new, input_norm=total.sqrt())
        if Statistic.SECOND_MOMENT in wanted:
            moment = self.second_moment
            if moment is None:
                moment = torch.zeros(flat.shape[1], flat.shape[1])
            _add_products(moment, flat)
            new = replace(new, second_moment=moment)
        return new

    def rescaled(self, scales: Tensor) -> Statistics:
        """Return the statistics of inputs that are divided by scales [in]."""
        norm, moment = self.input_norm, self.second_moment
        return replace(
            self,
            input_norm=None if norm is None else norm / scales,
            second_moment=None if moment is None else (moment / scales).div_(scales[:, None]),
        )

    @cached_property
    def whitener(self) -> tuple[Tensor, Tensor]:
        """Matrices S and its inverse, float32 [in, in], with S S' the second moment.

        By eigenvectors; channels that never occur have a small share of the largest eigenvalue.
        """
        import torch

        assert self.second_moment is not None
        values, vectors = torch.linalg.eigh(self.second_moment.double())
        values = values.clamp(min=float(values.max()) * 1e-9 + 1e-30)
        root = values.sqrt()
        return (vectors * root).float(), (vectors / root).T.float()

    @property
    def mean_squares(self) -> Tensor | None:
        """Mean square of each input channel, float32 [in]: the importance of its weights."""
        if self.second_moment is not None:
            return self.second_moment.diagonal() / max(self.count, 1)
        return None if self.input_norm is None else self.input_norm.square() / max(self.count, 1)


def _add_products(moment: Tensor, x: Tensor) -> None:
    """Add x' x to a symmetric matrix, in place, for x [T, in]; only half of it is multiplied."""
    size = len(moment)
    for start in range(0, size, _COLUMNS):
        end = min(start + _COLUMNS, size)
        moment[start:end, start:].addmm_(x[:, start:end].T, x[:, start:])
        moment[end:, start:end] = moment[start:end, end:].T


@dataclass(frozen=True)
class Block:
    """One decoder block that is being compressed.

    Attributes:
        index: of the layer.
        config: the model's shape.
        shape: the layer's shape.
        weights: float32 tensors of the layer by name (`q`, `attn_norm`, `q.bias`); transforms
            replace entries.
        stats: of the inputs of each matrix, as far as the recipe asks for them; transforms that
            scale the channels of inputs rescale entries.
        inputs: float32 [B, T, hidden], what the blocks before put out, already compressed.
        run: the block's output for some weights and inputs, differentiable.
        bases: transforms of the inputs of some matrices, which transforms may add; the matrix is
            compressed as it multiplies the transformed inputs, whose statistics are measured then.
            `weights` has the matrix as it multiplies plain inputs.
        ranges: of the inputs of some matrices, which transforms may add; the matrix is stored as
            one that multiplies inputs rounded within them.
    """

    index: int
    config: ModelConfig
    shape: LayerConfig
    weights: dict[str, Tensor]
    stats: dict[str, Statistics]
    inputs: Tensor
    run: Callable[[LayerWeights, Tensor], Tensor] = field(repr=False)
    bases: dict[str, Kronecker] = field(default_factory=dict)
    ranges: dict[str, InputRange] = field(default_factory=dict)


class Compressor(Method):
    """What all methods of compression say about themselves.

    Attributes:
        statistics: what calibration has to measure for it; empty for methods without data.
    """

    needs: ClassVar[frozenset[Ability]] = frozenset({Ability.TORCH})
    statistics: ClassVar[frozenset[Statistic]] = frozenset()
    own_texts: ClassVar[bool] = False  # is calibrated on the model's own texts by default

    @property
    def optional_statistics(self) -> frozenset[Statistic]:
        """Return what it looks at where it was measured, and can do without."""
        return frozenset()


@dataclass(frozen=True)
class WeightCompressor(Compressor, ABC):
    """A method that compresses one matrix at a time; its fields are its settings.

    Attributes:
        alone: other methods would spoil what it stores: it is all of a recipe, or of a rule.
        plain_inputs: what it stores multiplies the inputs as they are, so that no transform of the
            inputs goes with it.
    """

    alone: ClassVar[bool] = False
    plain_inputs: ClassVar[bool] = False

    @property
    def keeps_zeros(self) -> bool:
        """Whether what a pruner made zero is zero in what it stores, too."""
        return False

    @property
    def quick(self) -> WeightCompressor:
        """A cheap method with the same grid, for searches that compress a matrix many times."""
        return self

    def for_block(
        self, weights: Mapping[str, Tensor], stats: Mapping[str, Statistics]
    ) -> Mapping[str, WeightCompressor]:
        """Return what compresses each matrix of a block; one that is left out stays as it is.

        Methods that divide a budget among matrices, or factor several together, override this.

        Args:
            weights: float32 [out, in] by name (`q`); those that this method is to compress.
            stats: of the inputs of each.
        """
        return dict.fromkeys(weights, self)

    def for_matrix(self, name: str, config: ModelConfig) -> WeightCompressor:
        """Return the method with the settings for one matrix; itself by default.

        Args:
            name: canonical, e.g. `layers.0.q`.
            config: the model's shape.
        """
        return self

    def note(self, shape: tuple[int, int]) -> str | None:
        """Return what the card tells of a matrix of some shape, e.g. that it takes another form."""
        return None

    @abstractmethod
    def compress(self, weight: Tensor, stats: Statistics) -> Linear:
        """Return the stored form of a matrix.

        Args:
            weight: float32 [out, in]; not written to.
            stats: of its inputs; holds what `statistics` names.

        Raises:
            MethodError: the settings do not fit the matrix.
        """


@dataclass(frozen=True)
class BlockTransform(Compressor, ABC):
    """A method that rewrites the weights of a block so that they compress better.

    Attributes:
        of_inputs: it adds to `Block.bases` or `Block.ranges`, and is the last transform of a
            recipe: others look at the inputs as they are.
        rescales: it keeps `Block.stats` true, so that they need not be measured again.
    """

    of_inputs: ClassVar[bool] = False
    rescales: ClassVar[bool] = False

    @abstractmethod
    def transform(self, block: Block, compressor: WeightCompressor) -> None:
        """Replace entries of `block.weights`; the block's output stays the same up to rounding.

        Args:
            block: with the statistics that `statistics` names.
            compressor: what will compress the matrices.
        """


@dataclass(frozen=True)
class Correction(Compressor, ABC):
    """A method that makes up for what the compression of a matrix lost."""

    @abstractmethod
    def correct(self, weight: Tensor, stored: Linear, stats: Statistics) -> Linear:
        """Return a stored form that is closer to a matrix.

        Args:
            weight: float32 [out, in], as it was.
            stored: its compressed form.
            stats: of its inputs.
        """


@dataclass(frozen=True)
class BlockTuner(Compressor, ABC):
    """A method that trains what is stored of a block, so that its outputs come closer."""

    @abstractmethod
    def tune(self, block: Block, stored: Mapping[str, Linear]) -> dict[str, Linear]:
        """Return stored forms of the same sizes with a smaller error of the block's outputs.

        Args:
            block: with the weights as they were before they were compressed; vectors in
                `block.weights`, such as norms, may be replaced.
            stored: the compressed matrices by name; matrices that are kept are missing.

        Returns:
            the matrices of `stored`, tuned or as they were.
        """


@dataclass(frozen=True)
class ModelTuner(Compressor, ABC):
    """A method that trains what is stored of a whole model, once its blocks are compressed.

    All of the model is in memory, unlike with other methods.

    Attributes:
        keeps_codes: it leaves what matrices are stored as alone, or at least their zeros.
    """

    keeps_codes: ClassVar[bool] = False

    @abstractmethod
    def tune(self, model: CompressedModel) -> list[dict[str, Linear | Tensor]]:
        """Return the stored matrices and vectors of each layer, trained or as they were.

        Raises:
            MethodError: it trains none of the stored forms, or training gave no number.
        """
