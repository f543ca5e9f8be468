"""Layers that multiply with the matrices of other layers, while both are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from paceline.compress.base import MATRICES
from paceline.compress.reconstruct.recovery import TrainedLayer

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.blocks import LayerWeights

Terms = Mapping[str, tuple["Tensor", "Tensor"]]  # [out, rank] and [rank, in] by matrix


class BorrowingLayer:
    """A layer with the matrices of another one, products of low rank beside them, and own vectors.

    Args:
        weights: float32 tensors of the layer, of which the vectors are its own.
        other: the layer whose matrices it has; what is trained of those counts for both.
        terms: products that are added to matrices.
    """

    def __init__(self, weights: Mapping[str, Tensor], other: TrainedLayer, terms: Terms) -> None:
        self._other = other
        vectors = {name: each for name, each in weights.items() if name not in MATRICES}
        self._vectors = {name: each.clone().requires_grad_() for name, each in vectors.items()}
        self._terms = {
            name: (left.clone().requires_grad_(), right.clone().requires_grad_())
            for name, (left, right) in terms.items()
        }

    def groups(self) -> list[tuple[Tensor, float]]:
        """Return the parameters with their factors of the rate; those of the other are its own."""
        pairs = [(each, 1.0) for pair in self._terms.values() for each in pair]
        return [*((each, 1.0) for each in self._vectors.values()), *pairs]

    def weights(self) -> LayerWeights:
        """Return what a block multiplies with, differentiable."""
        theirs = self._other.weights()
        shared: dict[str, Any] = {name: theirs[name] for name in MATRICES if name in theirs}
        for name, pair in self._terms.items():
            shared[name] = _product(shared[name], *pair)
        return {**shared, **self._vectors}

    def vectors(self) -> dict[str, Tensor]:
        """Return the layer's own vectors as they were trained."""
        return {name: each.detach() for name, each in self._vectors.items()}

    def terms(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the products as they were trained."""
        return {name: (one.detach(), other.detach()) for name, (one, other) in self._terms.items()}


def _product(matrix: Any, left: Tensor, right: Tensor) -> Any:
    """Return the product with a matrix, or what stands for it, and the factors beside it."""
    from torch import Tensor
    from torch.nn import functional as F

    def multiply(x: Tensor) -> Tensor:
        whole = F.linear(x, matrix) if isinstance(matrix, Tensor) else matrix(x)
        added: Tensor = whole + F.linear(F.linear(x, right), left)
        return added

    return multiply
