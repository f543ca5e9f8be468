"""Integers of both kinds of scales as parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.compress.reconstruct.grouped import TrainedGroups
from paceline.compress.reconstruct.two_grained import TrainedTwoGrained

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.compress.reconstruct.trainable import Trainable
    from paceline.models.tensors import Linear


def trained_integers(weight: Tensor, stored: Linear) -> Trainable | None:
    """Return the codes, scales and zero points of a matrix as parameters.

    Args:
        weight: float32 [out, in], what the codes stand for.
        stored: the matrix; None is returned for other forms than integers in groups.
    """
    from paceline.models.tensors import Grouped, TwoGrained

    if isinstance(stored, TwoGrained):
        return TrainedTwoGrained(weight, stored)
    return TrainedGroups(weight, stored) if isinstance(stored, Grouped) else None
