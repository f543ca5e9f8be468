"""CALM: a token leaves the model behind the layer at which it is confident enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.exits.base import ExitPolicy, Gate
from paceline.registry import Source, check_range, exits

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.gated_block import ExitPass

MEASURES = ("softmax", "state")


@exits.register("calm", Exactness.LOSSY)
@dataclass(frozen=True)
class Calm(ExitPolicy):
    """Leave the remaining layers out once a token's confidence reaches `threshold`.

    The state is passed on unchanged; later layers take their keys and values from it. `softmax`
    measures the difference of the two largest probabilities behind a layer, which costs the output
    head at every layer; `state` the cosine similarity of a layer's input and output.

    Attributes:
        threshold: confidence from which a token leaves. Default 0.9.
        measure: `softmax` or `state`. Default softmax: models that were not trained to exit have
            similar states everywhere.
        first: layers that every token runs. Default 1.
    """

    source = Source(
        authors="Schuster et al.",
        title="Confident Adaptive Language Modeling",
        arxiv="2207.07061",
        section="sections 3.3 and 3.5",
        note="for decoder-only models; the threshold is a setting",
    )
    catalogue = (250,)
    missing = {
        250: "calibration of the threshold to a bound on a text's quality, its decay over a text, "
        "the trained classifier, and training of the exits"
    }
    examples = ("calm", "calm:threshold=0.98,measure=state,first=2")

    threshold: float = 0.9
    measure: str = "softmax"
    first: int = 1

    def __post_init__(self) -> None:
        check_range(0.0, 1.0, self.name, threshold=self.threshold)
        check_range(0, 1 << 20, self.name, first=self.first)
        if self.measure not in MEASURES:
            raise MethodError(
                f"calm:measure is {self.measure!r:.40}, expected {' or '.join(MEASURES)}"
            )

    def gate(self, nodes: ExitPass) -> Gate:
        """Return what keeps the nodes that have left."""
        return _CalmGate(self, nodes)


class _CalmGate(Gate):
    def __init__(self, method: Calm, nodes: ExitPass) -> None:
        super().__init__(nodes)
        self._method = method
        self._running = nodes.full | True

    def attention(self, layer: int) -> Tensor:
        return self._running

    def note(self, layer: int, before: Tensor, middle: Tensor, after: Tensor) -> None:
        last = layer + 1 == self.nodes.layers
        undecided = self._running & ~self.nodes.full
        if last or layer + 1 < self._method.first or not bool(undecided.any()):
            return
        leaves = self._confidence(before, after) >= self._method.threshold
        self._running = self._running & (self.nodes.full | ~leaves)

    def _confidence(self, before: Tensor, after: Tensor) -> Tensor:
        from torch.nn import functional as F

        if self._method.measure == "state":
            return F.cosine_similarity(before.float(), after.float(), -1)
        likeliest = self.nodes.logits(after).float().softmax(-1).topk(2).values
        return likeliest[:, 0] - likeliest[:, 1]
