"""The contract of a pruner: score every weight; the base class selects which stay."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.compress.base import Statistics, WeightCompressor
from paceline.errors import MethodError
from paceline.registry import check_range

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear

_PATTERNS = {"2:4": (2, 4), "4:8": (4, 8)}


@dataclass(frozen=True)
class Pruner(WeightCompressor):
    """Sets the weights with the lowest scores to zero.

    Attributes:
        sparsity: share of the weights of every row that is removed, 0 to 1; of the patterns N:M
            it is what the pattern says, and the setting must be left alone. Default 0.5.
        pattern: `unstructured`, `2:4` or `4:8`: of every M neighbouring inputs N stay. Default
            unstructured.
    """

    sparsity: float = 0.5
    pattern: str = "unstructured"

    def __post_init__(self) -> None:
        check_range(0.0, 1.0, self.name, sparsity=self.sparsity)
        if self.pattern != "unstructured" and self.pattern not in _PATTERNS:
            raise MethodError(
                f"{self.name}:pattern is {self.pattern!r}, expected unstructured, "
                f"{' or '.join(_PATTERNS)}"
            )
        if self.pattern in _PATTERNS and self.sparsity != 0.5:
            raise MethodError(
                f"{self.name}:pattern={self.pattern} removes half; leave sparsity out"
            )

    @abstractmethod
    def score(self, weight: Tensor, stats: Statistics) -> Tensor:
        """Return a score for each weight, [out, in] -> [out, in]; higher scores stay."""

    def compress(self, weight: Tensor, stats: Statistics) -> Linear:
        """Keep the weights with the best scores, unchanged."""
        return self.store(weight, self.select(self.score(weight, stats)))

    def store(self, weight: Tensor, kept: Tensor) -> Linear:
        """Return the stored form of the weights [out, in] that stay, as bool [out, in] says."""
        from paceline.models.tensors import Sparse

        return Sparse(kept.numpy(), weight[kept].numpy(), "F32", _PATTERNS.get(self.pattern))

    def note(self, shape: tuple[int, int]) -> str | None:
        """Tell that zeros are multiplied, too, where no quantizer follows."""
        return (
            "pruned: files hold no zeros, but engines multiply those of half-precision numbers; a "
            "quantizer behind the pruner (symmetric, 8 bits, or 4 with pattern=2:4) spares them"
        )

    @property
    def has_pattern(self) -> bool:
        """Whether N of every M neighbouring inputs stay."""
        return self.pattern in _PATTERNS

    def group_width(self, columns: int) -> int:
        """Return how many neighbouring inputs compete: M of a pattern N:M, or all of a row.

        Raises:
            MethodError: rows are no whole groups.
        """
        width = _PATTERNS.get(self.pattern, (columns, columns))[1]
        if columns % width:
            raise MethodError(
                f"{self.name}:pattern={self.pattern} needs rows of a multiple of {width} inputs, "
                f"this matrix has {columns}"
            )
        return width

    def select(self, scores: Tensor) -> Tensor:
        """Return which weights stay, bool [out, in]; of equal scores the first inputs."""
        import torch

        rows, columns = scores.shape
        of = self.group_width(columns)
        keep = _PATTERNS[self.pattern][0] if self.has_pattern else of - int(of * self.sparsity)
        groups = scores.reshape(rows, columns // of, of)
        best = groups.sort(dim=-1, descending=True, stable=True).indices[..., :keep]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).reshape(rows, -1)
