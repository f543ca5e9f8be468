"""The contract of a compressor: what it wants to know of a matrix, and what it makes of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

from paceline.abilities import Ability
from paceline.registry import Method

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear


class Statistic(StrEnum):
    """Something that calibration can measure about the inputs of a matrix."""

    INPUT_NORM = "input norm"  # root of the sum of squares of each input channel
    SECOND_MOMENT = "second moment"  # sum of x x', the Hessian of the layer's squared error


@dataclass(frozen=True, slots=True)
class Statistics:
    """What calibration measured about the inputs x of one matrix; None where it was not asked for.

    Attributes:
        count: calibration positions.
        input_norm: float32 [in], the Euclidean norm of each channel over all positions.
        second_moment: float32 [in, in], the sum of x x' over all positions.
    """

    count: int = 0
    input_norm: Tensor | None = None
    second_moment: Tensor | None = None

    def plus(self, x: Tensor, wanted: frozenset[Statistic]) -> Statistics:
        """Return the statistics with further positions x [..., in]."""
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        new = replace(self, count=self.count + len(flat))
        if Statistic.INPUT_NORM in wanted:
            squares = flat.square().sum(0)
            old = self.input_norm
            total = squares if old is None else old.square() + squares
            new = replace(new, input_norm=total.sqrt())
        if Statistic.SECOND_MOMENT in wanted:
            moment = flat.T @ flat
            old = self.second_moment
            new = replace(new, second_moment=moment if old is None else old + moment)
        return new


@dataclass(frozen=True)
class WeightCompressor(Method, ABC):
    """A method that compresses one matrix at a time; its fields are its settings.

    Attributes:
        statistics: what calibration has to measure for it; empty for methods without data.
    """

    needs: ClassVar[frozenset[Ability]] = frozenset({Ability.TORCH})
    statistics: ClassVar[frozenset[Statistic]] = frozenset()

    @abstractmethod
    def compress(self, weight: Tensor, stats: Statistics) -> Linear:
        """Return the stored form of a matrix.

        Args:
            weight: float32 [out, in]; not written to.
            stats: of its inputs; holds what `statistics` names.

        Raises:
            MethodError: the settings do not fit the matrix.
        """
