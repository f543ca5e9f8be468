"""Block-AP: train codes, scales, zero points and norms of a block together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.compress.reconstruct.integers import trained_integers
from paceline.compress.reconstruct.trainable import Trainable
from paceline.compress.tune.base import Tuner
from paceline.core import Exactness
from paceline.registry import Source, tuners

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear


@tuners.register("block_ap", Exactness.LOSSY)
@dataclass(frozen=True)
class BlockAP(Tuner):
    """Train all numbers of grouped integers, and the norms, on the outputs of the block.

    Scales may be whole numbers times one of each row (`scale_bits`), and codes may stand for a
    table of levels (`levels=learned` with `scale_bits`), which is not trained.

    Codes are rounded from trained positions between them, through which gradients pass; they
    start at what the quantizer chose, so that nothing of what it gained is lost.

    Attributes:
        steps: as of every tuner.
        rate: as of every tuner; in codes. Scales and norms move a tenth of it, relatively.
        batch: as of every tuner.
    """

    source = Source(
        authors="Chen et al.",
        title="EfficientQAT: Efficient Quantization-Aware Training for Large Language Models",
        arxiv="2407.11062",
        section="section 3.2",
        note="starts from any quantizer; trains norms, too, as OmniQuant (2308.13137) does",
    )
    examples = ("block_ap:steps=8",)

    trains = "integers in groups"

    def trainable(self, weight: Tensor, stored: Linear) -> Trainable | None:
        """Return codes, scales and zero points of grouped integers."""
        return trained_integers(weight, stored)
