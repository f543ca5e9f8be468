"""Temperature."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.control.base import Stateless, require
from paceline.core import Exactness, Floats
from paceline.registry import controls

TEMPERATURE = 40  # controls before it edit the model's logits, those after it truncate


@controls.register("temperature", Exactness.EXACT)
@dataclass(frozen=True)
class Temperature(Stateless):
    """Flatten or sharpen the distribution: softmax(logits / temperature).

    Attributes:
        value: 0.001 to 1000; 1 changes nothing. Greedy decoding (temperature 0) uses no control.
    """

    value: float = 1.0

    order = TEMPERATURE
    examples = ("temperature:value=0.7",)

    def __post_init__(self) -> None:
        require(1e-3 <= self.value <= 1e3, "temperature", self.value, "0 or 0.001 to 1000")

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """Divide the logits."""
        scaled: Floats = logits / self.value
        return scaled
