"""SqueezeLLM: a codebook for each row, weighted by sensitivity, and a few weights kept apart."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from paceline.compress.base import Statistic, Statistics, WeightCompressor
from paceline.compress.quantize.base import check_finite
from paceline.compress.quantize.grids.kmeans import RowClusters, nearest
from paceline.compress.quantize.grids.outliers import add_outliers, largest
from paceline.core import Exactness
from paceline.registry import Source, check_range, quantizers

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear


@quantizers.register("squeezellm", Exactness.LOSSY)
@dataclass(frozen=True)
class SqueezeLLM(WeightCompressor):
    """Look up each weight in a table of its row, made by k-means weighted by Fisher information.

    The weights that are largest, and those that the loss is most sensitive to, are stored in half
    precision in a sparse matrix beside it. Recipes with a transform of the weights, for which
    there are no gradients, are refused.

    Attributes:
        bits: of a code, 2 to 8; a table has 2**bits entries of half precision. Default 4.
        outliers: share of the weights with the largest values that is kept apart, 0 to 0.1.
            Default 0.0045.
        sensitive: share of the weights with the largest Fisher information that is kept apart, 0
            to 0.1. Default 0.0005.
    """

    bits: int = 4
    outliers: float = 0.0045
    sensitive: float = 0.0005

    source = Source(
        authors="Kim et al.",
        title="SqueezeLLM: Dense-and-Sparse Quantization",
        arxiv="2306.07629",
        section="sections 4.1 and 4.2",
        note="the outliers of a matrix instead of each row's; positions as gaps in bytes",
    )
    catalogue = (222,)
    missing = MappingProxyType(
        {222: "kernels that look tables up and multiply few weights: engines expand the matrix"}
    )
    examples = ("squeezellm", "squeezellm:bits=3,outliers=0.01,sensitive=0")

    def __post_init__(self) -> None:
        check_range(2, 8, self.name, bits=self.bits)
        check_range(0.0, 0.1, self.name, outliers=self.outliers, sensitive=self.sensitive)

    @property
    def optional_statistics(self) -> frozenset[Statistic]:
        """See `Compressor`."""
        return frozenset({Statistic.FISHER})

    def compress(self, weight: Tensor, stats: Statistics) -> Linear:
        """See `WeightCompressor`; without gradients all weights count alike."""
        import numpy as np
        import torch

        from paceline.models.tensors import Codebook

        check_finite(weight, self.name)
        fisher = torch.ones_like(weight) if stats.fisher is None else stats.fisher
        apart = largest(weight.abs(), self.outliers)
        if stats.fisher is not None:
            apart |= largest(fisher, self.sensitive)
        share = torch.where(apart, 0.0, fisher)
        rest = torch.where(apart, 0.0, weight)  # outliers do not widen the range of the table
        entries = RowClusters(rest, share).fit(2**self.bits).half().float()
        codes = nearest(rest, entries).numpy().astype(np.uint16)[..., None]
        table = np.ascontiguousarray(entries.numpy())[None, :, :, None]
        return add_outliers(weight, Codebook(codes, table, float_type="F16"), apart)
