"""Weights that are stored apart, in half precision, beside a quantised matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear

_TOP = 65504.0  # the largest number of half precision


def largest(scores: Tensor, share: float) -> Tensor:
    """Return a mask of the largest scores of a matrix: a share of them; of equal ones the first."""
    import torch

    count = round(share * scores.numel())
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    order = scores.flatten().sort(descending=True, stable=True).indices
    mask[order[:count]] = True
    return mask.reshape(scores.shape)


def add_outliers(weight: Tensor, stored: Linear, apart: Tensor) -> Linear:
    """Return a stored matrix with what some weights miss added, in half precision.

    Args:
        weight: float32 [out, in], as it was.
        stored: its compressed form.
        apart: bool [out, in], the weights that become as they were.
    """
    import numpy as np
    import torch

    from paceline.models.tensors import Sparse, Sum

    if not bool(apart.any()):
        return stored
    missing = (weight - torch.from_numpy(stored.dense()))[apart]
    values = missing.clamp(-_TOP, _TOP).numpy().astype(np.float16)
    return Sum((stored, Sparse(apart.numpy(), values, "F16")))
