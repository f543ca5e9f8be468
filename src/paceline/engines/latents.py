"""Layers whose keys and values are made of one latent, which the reference engine caches."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from paceline.core import Floats
from paceline.models.config import LayerConfig
from paceline.models.tensors import Linear, LowRank


def latent_factors(
    weights: Mapping[str, Linear | Floats], index: int, layer: LayerConfig
) -> dict[str, Linear] | None:
    """Return what makes the latent of a layer, and keys and values of it; None where there is none.

    Keys and values have a latent where their matrices are products with one right factor (recipe
    `transmla`) that is smaller than they are together.

    Args:
        weights: canonical name -> float32 array or stored matrix.
        index: of the layer.
        layer: its shape.

    Returns:
        `latent` [r, hidden], `k` and `v` [kv_heads * head_dim, r].
    """
    if not layer.heads:
        return None
    k, v = (weights[f"layers.{index}.{name}"] for name in "kv")
    if not isinstance(k, LowRank) or not isinstance(v, LowRank):
        return None
    rank = k.right.shape[0]
    if v.right.shape != k.right.shape or rank >= 2 * layer.kv_heads * layer.head_dim:
        return None
    one, other = k.right.tensors(), v.right.tensors()
    if one.keys() != other.keys() or any(
        not np.array_equal(array, other[name]) for name, array in one.items()
    ):
        return None
    return {"latent": k.right, "k": k.left, "v": v.left}
