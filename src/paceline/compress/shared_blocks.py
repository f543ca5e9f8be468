"""Blocks that have the matrices of another block as that one stores them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from paceline.compress.base import MATRICES
from paceline.compress.lowrank.base import low_rank
from paceline.errors import MethodError
from paceline.models.tensors import Linear, RoundedInputs, to_dense

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.compress.restructure import SharedLayer

BITS = 8  # of the factors of terms, which kernels multiply beside what is shared


def shared_block(
    index: int,
    weights: Mapping[str, Tensor],
    shared: SharedLayer,
    finished: Mapping[str, Linear | Tensor],
) -> tuple[dict[str, Linear | Tensor], dict[str, Tensor]]:
    """Return what is stored of a block that has the matrices of another, and what it multiplies.

    Args:
        index: of the block.
        weights: of it, of which the vectors are stored.
        shared: whose matrices it has.
        finished: what is stored of that block.

    Raises:
        MethodError: a matrix of that block rounds its inputs.
    """
    import torch

    stored: dict[str, Linear | Tensor] = {}
    run: dict[str, Tensor] = {}
    for name, each in weights.items():
        if name not in MATRICES:
            stored[name] = run[name] = each
            continue
        source = finished[name]
        if isinstance(source, RoundedInputs):
            raise MethodError(
                f"layer {index} shares matrices with layer {shared.source}, whose recipe rounds "
                "their inputs; take a quantizer that stores integers or tables alone, e.g. gptq"
            )
        values = source if isinstance(source, torch.Tensor) else torch.from_numpy(source.dense())
        if name in shared.terms:
            term = low_rank(*shared.terms[name], BITS)
            stored[name] = term
            values = values + torch.from_numpy(np.array(to_dense(term)))
        run[name] = values
    return stored, run
