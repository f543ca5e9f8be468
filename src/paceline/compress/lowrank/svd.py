"""Singular values after whitening: the product that loses least on the calibration texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.compress.base import Statistic, Statistics
from paceline.compress.lowrank.base import Curve, Factorizer, low_rank, store, whitened_factors
from paceline.core import Exactness
from paceline.registry import Source, factorizers

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear

_LARGEST = 1.05  # coefficient at which the choice of rows ends


@factorizers.register("svd", Exactness.LOSSY)
@dataclass(frozen=True)
class WhitenedSVD(Factorizer):
    """Cut the singular values of the matrix times the root of its inputs' second moment.

    The result has the smallest squared error of the outputs of all products of its rank. Ranks
    differ between the matrices of a block: each has the rank at which one more number would save
    as much of its output's relative error as in the others.

    Attributes:
        keep: as of every factorizer.
        bits: as of every factorizer.
        spread: let ranks differ within a block. Default true.
        pivots: store rows of the matrix and coefficients that make the other rows of them: the same
            product in rank^2 fewer numbers, hence more ranks in as many. Default true.
    """

    spread: bool = True
    pivots: bool = True

    source = Source(
        authors="Wang et al.",
        title="SVD-LLM: Truncation-aware Singular Value Decomposition for LLM Compression",
        arxiv="2403.07378",
        section="section 3.1",
        note="the root by eigenvectors; without the update of the left factor; rows and "
        "coefficients instead of two factors as in Pivoting Factorization (2501.19090)",
    )
    catalogue = (171,)
    missing = {171: "training of the factors; Linformer's projection along the sequence"}
    examples = ("svd:keep=0.9", "svd:keep=0.9,bits=8", "svd:pivots=false,spread=false")
    statistics = frozenset({Statistic.SECOND_MOMENT})

    def curve(self, weight: Tensor, stats: Statistics) -> Curve | None:
        """Return the energy of the singular values that each rank leaves out."""
        import torch

        if not self.spread:
            return None
        root, _ = stats.whitener
        energy = torch.linalg.svdvals(weight @ root).double().square()
        lost = energy.flip(0).cumsum(0).flip(0) / energy.sum().clamp(min=1e-300)
        losses = torch.cat((lost[1:], torch.zeros(1, dtype=torch.float64)))
        rows, columns = weight.shape
        ranks = torch.arange(1, len(energy) + 1, dtype=torch.float64)
        numbers = ranks * (rows + columns - (ranks if self.pivots else 0))
        numbers[-1] = rows * columns
        sound = numbers <= rows * columns
        return Curve(numbers[sound], losses[sound])

    def rank(self, rows: int, columns: int) -> int:
        """Return how many ranks have the share `keep` of a matrix's numbers."""
        size, both = self.keep * rows * columns, rows + columns
        if not self.pivots:
            return max(1, int(size / both + 1e-6))
        return max(1, int((both - (both * both - 4 * size) ** 0.5) / 2 + 1e-6))

    def compress(self, weight: Tensor, stats: Statistics) -> Linear:
        """See `WeightCompressor`."""
        rank = self.rank(*weight.shape)
        if self.keep == 1 or (self.pivots and rank >= min(weight.shape)):
            return store(weight, self.bits)
        left, right = whitened_factors(weight, stats, rank)
        if not self.pivots:
            return low_rank(left, right, self.bits)
        return _pivoted(left, right, self.bits)


def _pivoted(left: Tensor, right: Tensor, bits: int) -> Linear:
    """Return the product of factors [out, r] and [r, in] as r of its rows and coefficients."""
    import numpy as np
    import torch

    from paceline.models.tensors import Pivoted

    orthogonal, rest = torch.linalg.qr(left.double())
    order, coefficients = _choose_rows(orthogonal)
    rank = left.shape[1]
    kept, others = order[:rank].sort().values, order[rank:].sort()
    columns = order[:rank].argsort()
    basis = (orthogonal[kept] @ (rest @ right.double())).float()
    made = coefficients[rank:][others.indices][:, columns].float()
    pivots = kept.numpy().astype(np.int32)
    return Pivoted(pivots, store(basis, bits), store(made.contiguous(), bits))


def _choose_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Choose rows of a float64 matrix [out, r] that make all others with small coefficients.

    From the pivots of an LU decomposition on, the row with the largest coefficient takes the place
    of the row that it is a coefficient of, while it is larger than `_LARGEST`: each exchange
    enlarges the determinant of the chosen rows.

    Returns:
        an order of the rows, the r chosen ones first, and the coefficients of all rows in this
        order, [out, r].
    """
    import torch

    rank = matrix.shape[1]
    order = torch.linalg.lu(matrix)[0].argmax(0)
    square = matrix[order[:rank]]
    coefficients = torch.linalg.solve(square.T, matrix[order].T).T.contiguous()
    for _ in range(4 * len(matrix)):
        rest = coefficients[rank:].abs()
        if not rest.numel() or float(rest.max()) <= _LARGEST:
            break
        row, column = divmod(int(rest.argmax()), rank)
        row += rank
        # The new row becomes a unit vector, the old one what makes it of the others.
        change = coefficients[row].clone()
        change[column] -= 1
        coefficients -= coefficients[:, column : column + 1] * (change / coefficients[row, column])
        order[[column, row]] = order[[row, column]]
        coefficients[[column, row]] = coefficients[[row, column]]
    return order, coefficients
