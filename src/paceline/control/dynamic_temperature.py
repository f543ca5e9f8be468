"""Entropy-based dynamic temperature."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.control.base import Stateless, require
from paceline.control.logits import entropy, softmax
from paceline.core import Exactness, Floats
from paceline.registry import Source, controls

_MIN_SCALE = 1e-3


@controls.register("dynamic_temperature", Exactness.EXACT)
@dataclass(frozen=True)
class DynamicTemperature(Stateless):
    """Lower the temperature where entropy is low: T = T0 * base^(theta / entropy).

    T0 is the request's temperature; both apply.

    Attributes:
        theta: strength, 0 to 10; 0 does nothing. Default 0.1; the paper uses 0.1 to 1.
        base: in (0, 1). Default 0.8, the paper's.
    """

    theta: float = 0.1
    base: float = 0.8

    order = 39
    examples = ("dynamic_temperature",)
    source = Source(authors="Zhang et al.", title="EDT", arxiv="2403.14541", section="section 3.3")
    catalogue = (280,)

    def __post_init__(self) -> None:
        require(0 <= self.theta <= 10, "dynamic_temperature", self.theta, "0 to 10")
        require(0 < self.base < 1, "dynamic_temperature:base", self.base, "between 0 and 1")

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """Divide the logits by base^(theta / entropy), which is kept at 0.001 or more."""
        if self.theta == 0:
            return logits
        spread = max(entropy(softmax(logits)), 1e-9)
        scaled: Floats = logits / max(self.base ** (self.theta / spread), _MIN_SCALE)
        return scaled
