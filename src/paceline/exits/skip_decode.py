"""SkipDecode: the later a token, the fewer layers it runs, by a schedule of positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.core import Exactness
from paceline.exits.base import ExitPolicy, Gate
from paceline.registry import Source, check_range, exits

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.gated_block import ExitPass


@exits.register("skip_decode", Exactness.LOSSY)
@dataclass(frozen=True)
class SkipDecode(ExitPolicy):
    """Run fewer layers the later a position is: the first ones and the last ones.

    The share of layers falls in a straight line from `most` at position 0 to `least` at position
    `span`, and stays there. The first layers and as many of the last ones as the share leaves are
    run. Later positions so run a part of what earlier ones run, and find all keys and
    values that they read; every text of a batch runs the same layers at the same position.

    Attributes:
        most: share of the layers at position 0. Default 1.
        least: share of the layers from position `span` on. Default 0.75.
        span: positions over which the share falls. Default 512.
        first: share of the layers, from the first on, that every position runs; counted in the
            other shares. Default 0.5: an untrained model can best do without its middle.
    """

    source = Source(
        authors="Del Corro et al.",
        title="SkipDecode: Autoregressive Skip Decoding with Batching and Caching for Efficient "
        "LLM Inference",
        arxiv="2307.02628",
        section="section 3",
        note="more than one first layer, as models are not finetuned",
    )
    catalogue = (38,)
    missing = {38: "finetuning of the model under the schedule, without which it loses much"}
    examples = ("skip_decode", "skip_decode:most=0.9,least=0.5,span=32,first=0.4")

    most: float = 1.0
    least: float = 0.75
    span: int = 512
    first: float = 0.5

    def __post_init__(self) -> None:
        check_range(0.0, 1.0, self.name, most=self.most)
        check_range(0.0, self.most, self.name, least=self.least)
        check_range(1, 1 << 30, self.name, span=self.span)
        check_range(0.0, 1.0, self.name, first=self.first)

    def gate(self, nodes: ExitPass) -> Gate:
        """Return what knows the layers of each node."""
        return _ScheduleGate(self, nodes)


class _ScheduleGate(Gate):
    def __init__(self, method: SkipDecode, nodes: ExitPass) -> None:
        super().__init__(nodes)
        fallen = (nodes.at / method.span).clamp(max=1.0) * (method.most - method.least)
        count = ((method.most - fallen) * nodes.layers).round()
        self._first = round(method.first * nodes.layers)
        self._upper = nodes.layers - (count - self._first).clamp_min(0)  # where they go on, [N]

    def attention(self, layer: int) -> Tensor:
        return self.nodes.full | (self._upper <= layer) | (layer < self._first)
