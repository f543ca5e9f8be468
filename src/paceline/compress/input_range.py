"""Static ranges of the inputs of matrices, as compression uses them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paceline.models.tensors import Linear


@dataclass(frozen=True)
class InputRange:
    """How the inputs of a matrix are rounded, the same at every position.

    Attributes:
        bits: of an input, with its sign.
        limit: the largest magnitude; larger inputs are clipped.
    """

    bits: int
    limit: float

    def wrap(self, stored: Linear) -> Linear:
        """Return the stored form of a matrix that multiplies rounded inputs."""
        import numpy as np

        from paceline.models.tensors import RoundedInputs

        return RoundedInputs(stored, self.bits, np.zeros(0, np.int32), 16, self.limit)
