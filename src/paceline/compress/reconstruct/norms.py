"""The norms of a block as parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Norms:
    """The norms of a block, trained by a factor for each channel.

    Args:
        weights: of the block, vectors among them.
        offset: that is added to norms where they are used.
    """

    def __init__(self, weights: Mapping[str, Tensor], offset: float) -> None:
        import torch

        self._offset = offset
        self._start = {name: each for name, each in weights.items() if name.endswith("norm")}
        self._logs = {
            name: torch.zeros_like(each, requires_grad=True) for name, each in self._start.items()
        }

    def groups(self) -> list[tuple[Tensor, float]]:
        """Return the parameters with their factors of the rate."""
        return [(each, 0.1) for each in self._logs.values()]

    def weights(self) -> dict[str, Tensor]:
        """Return the norms by name."""
        offset = self._offset
        return {
            name: (start + offset) * self._logs[name].exp() - offset
            for name, start in self._start.items()
        }

    def final(self) -> dict[str, Tensor]:
        """Return the norms by name, not differentiable."""
        return {name: each.detach() for name, each in self.weights().items()}
