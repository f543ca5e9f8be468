"""Top-a sampling."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.control.base import Stateless, require
from paceline.control.logits import keep_only, softmax
from paceline.core import Exactness, Floats
from paceline.registry import Source, controls


@controls.register("top_a", Exactness.EXACT)
@dataclass(frozen=True)
class TopA(Stateless):
    """Keep the tokens whose probability is at least `a` times the square of the largest.

    Attributes:
        a: in [0, 1]; 0 keeps all. Default 0.2, the author's.
    """

    a: float = 0.2

    order = 64
    examples = ("top_a",)
    source = Source(authors="BlinkDL", title="RWKV-LM, the top-a sampling method, 2022")

    def __post_init__(self) -> None:
        require(0 <= self.a <= 1, "top_a", self.a, "0 to 1")

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """Keep probabilities of at least a * max(p)^2."""
        if self.a == 0:
            return logits
        p = softmax(logits)
        return keep_only(logits, p >= self.a * p.max() ** 2)
