"""COMET: 4-bit weights, and activations of 4 bits but for blocks of channels with outliers."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from paceline.compress.base import Statistics
from paceline.compress.quantize.gptq import GPTQ
from paceline.core import Exactness
from paceline.registry import Source, check_range, quantizers

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear


@quantizers.register("comet", Exactness.LOSSY)
@dataclass(frozen=True)
class COMET(GPTQ):
    """Round activations to 4 bits, and those of channels with outliers, block by block, to 8.

    Channels are ordered by their activations, so that outliers fill few blocks. Weights have the
    codes of gptq. The reference engine computes what such products would; no kernel does.

    Attributes:
        bits: as of every quantiser.
        group: as of every quantiser.
        symmetric: as of every quantiser.
        search: as of every quantiser.
        levels: as of every quantiser.
        scale_bits: as of every quantiser.
        mean_bits: as of every quantiser.
        damping: as of gptq.
        order: as of gptq.
        passes: as of gptq.
        block: channels whose activations have the same bits, 1 to 4096. Default 32.
        ratio: how many times the median root mean square of the channels makes an outlier, at
            least 1. Default 4.
    """

    block: int = 32
    ratio: float = 4.0

    source = Source(
        authors="Liu et al.",
        title="COMET: Towards Practical W4A4KV4 LLMs Serving",
        arxiv="2410.12168",
        section="section 3",
        note="channels stay in their places, and blocks are lists of channels",
    )
    catalogue = (196,)
    missing = MappingProxyType(
        {196: "kernels of 4 and 8 bits, which are GPUs', and keys and values of 4 bits"}
    )
    examples = ("comet:group=32", "comet:bits=4,group=32,block=8,ratio=2")
    plain_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        GPTQ.__post_init__(self)
        check_range(1, 4096, self.name, block=self.block)
        check_range(1.0, 1e6, self.name, ratio=self.ratio)

    def quantize(self, weight: Tensor, stats: Statistics) -> Linear:
        """Return the codes of gptq, and which inputs have 8 bits."""
        import numpy as np

        from paceline.models.tensors import RoundedInputs

        stored = GPTQ.quantize(self, weight, stats)
        squares = stats.mean_squares
        assert squares is not None
        limit = float(squares.sqrt().median()) * self.ratio
        count = int((squares.sqrt() > limit).sum())
        whole = min(-(-count // self.block) * self.block, len(squares))
        apart = squares.sort(descending=True, stable=True).indices[:whole].sort().values
        return RoundedInputs(stored, 4, apart.numpy().astype(np.int32), 8)
