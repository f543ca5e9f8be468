"""FFN-SkipLLM: tokens whose MLPs change little leave the next ones out; attention always runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.core import Exactness
from paceline.exits.base import ExitPolicy, Gate
from paceline.registry import Source, check_range, exits

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.gated_block import ExitPass


@exits.register("ffn_skip", Exactness.LOSSY)
@dataclass(frozen=True)
class FfnSkip(ExitPolicy):
    """Leave out a token's next `skip` MLPs where one hardly turned its state.

    A token whose states before and behind an MLP have a cosine similarity of `threshold` or more
    leaves the MLPs of the next `skip` layers out, and is then measured again. The first and the
    last layers, whose MLPs change most, always run. Attention runs everywhere, so that the cache
    holds what it would.

    Attributes:
        threshold: similarity from which MLPs are left out. Default 0.98.
        skip: layers that go without. Default 2.
        first: share of the layers, from the first on, that always run. Default 0.5.
        last: share of the last layers that always run. Default 0.1.
    """

    source = Source(
        authors="Jaiswal et al.",
        title="FFN-SkipLLM: A Hidden Gem for Autoregressive Decoding with Adaptive Feed Forward "
        "Skipping",
        arxiv="2404.03865",
        section="section 3",
        note="shares of layers in place of the paper's cold start and cold end for each model",
    )
    catalogue = (166,)
    examples = ("ffn_skip", "ffn_skip:threshold=0.9,skip=1,first=0,last=0")

    threshold: float = 0.98
    skip: int = 2
    first: float = 0.5
    last: float = 0.1

    def __post_init__(self) -> None:
        check_range(0.0, 1.0, self.name, threshold=self.threshold)
        check_range(1, 1 << 20, self.name, skip=self.skip)
        check_range(0.0, 1.0, self.name, first=self.first, last=self.last)

    def gate(self, nodes: ExitPass) -> Gate:
        """Return what counts the MLPs that each node still leaves out."""
        return _FfnGate(self, nodes)


class _FfnGate(Gate):
    def __init__(self, method: FfnSkip, nodes: ExitPass) -> None:
        super().__init__(nodes)
        self._method = method
        self._inside = range(
            round(method.first * nodes.layers), nodes.layers - round(method.last * nodes.layers)
        )
        self._skips = nodes.at * 0  # MLPs that each node leaves out yet

    def attention(self, layer: int) -> Tensor:
        return self.nodes.full | True

    def mlp(self, layer: int) -> Tensor:
        if layer not in self._inside:
            return self.nodes.full | True
        return self.nodes.full | (self._skips == 0)

    def note(self, layer: int, before: Tensor, middle: Tensor, after: Tensor) -> None:
        from torch.nn import functional as F

        if layer not in self._inside:
            return
        same = F.cosine_similarity(middle.float(), after.float(), -1) >= self._method.threshold
        begins = (self._skips == 0) & same & ~self.nodes.full
        self._skips = (self._skips - 1).clamp_min(0) + begins * self._method.skip
