"""Any-Precision: codes that hold narrower codes, so that one file is loaded in several widths."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from paceline.compress.base import Statistic, Statistics, WeightCompressor
from paceline.compress.quantize.base import check_finite
from paceline.compress.quantize.grids.kmeans import RowClusters
from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.registry import Source, check_range, quantizers

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear


@quantizers.register("any_precision", Exactness.LOSSY)
@dataclass(frozen=True)
class AnyPrecision(WeightCompressor):
    """Part the clusters of a narrow codebook in two, bit by bit, up to the widest codes.

    The narrowest codebook of each row is k-means weighted by Fisher information. `--memory 4bits`
    loads all matrices with 4 bits, `--memory 80MB` with as many as fit.

    Attributes:
        min_bits: bits of the narrowest codes, 2 to 7. Default 3.
        bits: of the widest, above `min_bits` and up to 8. A row has a table for each width, which
            is little for long rows and much for short ones. Default 8.
    """

    min_bits: int = 3
    bits: int = 8

    source = Source(
        authors="Park et al.",
        title="Any-Precision LLM: Low-Cost Deployment of Multiple, Different-Sized LLMs",
        arxiv="2402.10517",
        section="section 3",
        note="clusters are parted by k-means of two; codes of up to 6 bits are multiplied as they "
        "are, planes repacked when they are loaded",
    )
    catalogue = (175,)
    missing = MappingProxyType(
        {175: "kernels for codes of 7 and 8 bits: they become half precision"}
    )
    examples = ("any_precision:bits=5", "any_precision:min_bits=2,bits=4")

    def __post_init__(self) -> None:
        check_range(2, 7, self.name, min_bits=self.min_bits)
        check_range(3, 8, self.name, bits=self.bits)
        if self.min_bits >= self.bits:
            raise MethodError(
                f"{self.name}:min_bits is {self.min_bits}, expected less than bits={self.bits}"
            )

    @property
    def optional_statistics(self) -> frozenset[Statistic]:
        """See `Compressor`."""
        return frozenset({Statistic.FISHER})

    def compress(self, weight: Tensor, stats: Statistics) -> Linear:
        """See `WeightCompressor`; without gradients all weights count alike."""
        import numpy as np
        import torch

        from paceline.models.tensors import NestedCodes

        check_finite(weight, self.name)
        share = torch.ones_like(weight) if stats.fisher is None else stats.fisher
        clusters = RowClusters(weight, share)
        entries = clusters.fit(2**self.min_bits)
        bounds = clusters.bounds(entries)
        tables = [entries.half()]
        for _ in range(self.min_bits, self.bits):
            entries, bounds = clusters.split(entries, bounds)
            tables.append(entries.half())
        if not all(bool(table.isfinite().all()) for table in tables):
            raise MethodError("the weights of a matrix are too large for half precision")
        codes = clusters.codes(bounds)
        losses = []
        for table, width in zip(tables, range(self.min_bits, self.bits + 1), strict=True):
            missed = table.float().gather(1, codes >> (self.bits - width)) - weight
            whole = (share * weight.square()).double().sum().clamp(min=1e-300)
            losses.append(float((share * missed.square()).double().sum() / whole))
        integers = codes.numpy()
        planes = [
            np.packbits((integers >> bit & 1).astype(bool), axis=1, bitorder="little")
            for bit in reversed(range(self.bits))
        ]
        return NestedCodes(
            np.stack(planes),
            tuple(np.ascontiguousarray(table.numpy()) for table in tables),
            weight.shape[1],
            np.minimum.accumulate(np.array(losses, np.float32)),
        )
