"""LongGen: most layers see a window and the first positions, the others everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.compress.structure.base import KeptLayer, Structure, StructureMethod, layer_states
from paceline.compress.whole_model import WholeModel, divergence
from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.models.config import LayerConfig
from paceline.registry import Source, check_range, structures

if TYPE_CHECKING:
    from torch import Tensor

CHOICES = ("even", "middle", "loss")


@structures.register("longgen", Exactness.LOSSY)
@dataclass(frozen=True)
class LongGen(StructureMethod):
    """Let most layers see the first and the last positions only, and a share of them everything.

    Prompts and answers alike, both engines then read less of long texts. `+recover` trains the
    result towards the model that it was. Texts of calibration must be longer than the window.

    Attributes:
        full: share of the layers that go on seeing everything, at least 0 and below 1. Default
            0.34.
        window: last positions that the others see, themselves included, from 1. Default 1024.
        sinks: first positions that these see, too, from 0: models put there the attention that they
            have no use for. Default 4.
        by: which layers see everything: every third or so (even), those in the middle, or those
            whose window would change the model most (loss). Default even.
        rows: texts of calibration that windows are judged by, 1 to 1000. Default 4.
    """

    full: float = 0.34
    window: int = 1024
    sinks: int = 4
    by: str = "even"
    rows: int = 4

    source = Source(
        authors="Ge et al.",
        title="A Little Goes a Long Way: Efficient Long Context Training and Inference with "
        "Partial Contexts",
        arxiv="2410.01485",
        section="3",
        note="a model that sees far already keeps its distances; `recover` distils it",
    )
    catalogue = (294,)
    missing = {
        294: "blocks that are read in strides; memory of rows behind "
        "the window, which stays taken; the training on billions of tokens that lengthens the "
        "context"
    }
    examples = ("longgen:window=16,sinks=1", "longgen:window=8,by=loss,rows=2")

    def __post_init__(self) -> None:
        check_range(0, 0.999, self.name, full=self.full)
        check_range(1, 1 << 30, self.name, window=self.window)
        check_range(0, 1 << 20, self.name, sinks=self.sinks)
        check_range(1, 1000, self.name, rows=self.rows)
        if self.by not in CHOICES:
            raise MethodError(f"{self.name}:by is {self.by!r}, expected {', '.join(CHOICES)}")

    def restructure(self, model: WholeModel, base: WholeModel, folder: Path) -> Structure:
        """See `StructureMethod`."""
        shapes, length = model.config.layers, model.texts.shape[1]
        far = [i for i, each in enumerate(shapes) if each.heads and not self._sees_less(each)]
        count = round(self.full * len(far))
        if count == len(far):
            raise MethodError(
                f"{self.name} leaves all of the {len(far)} layers that see more than {self.window} "
                "positions as they are; take a smaller full or window"
            )
        if length <= self.window + self.sinks:
            raise MethodError(
                f"texts of calibration have {length} tokens, and a window of {self.window} with "
                f"{self.sinks} sinks hides nothing of them; give a larger --length or smaller "
                f"{self.name}:window"
            )
        judged = replace(model, texts=model.texts[: self.rows]).in_memory
        states = layer_states(judged, shapes, 0, judged.embed(judged.texts))
        chosen = self._full(judged, far, count, states)
        near = [i for i in far if i not in chosen]
        left = [self.near(each) if i in near else each for i, each in enumerate(shapes)]
        apart = divergence(judged, states[-1], layer_states(judged, left, 0, states[0])[-1])
        note = (
            f"{self.name} lets the layers {', '.join(map(str, near))} of {len(shapes)} layers see "
            f"{self.sinks} first and {self.window} last positions: a divergence of {apart:.4f} "
            f"nats a token from the model before, on texts of {length} tokens."
        )
        return Structure([KeptLayer(index, shape) for index, shape in enumerate(left)], note)

    def near(self, shape: LayerConfig) -> LayerConfig:
        """Return the shape of a layer that sees the first and the last positions."""
        return replace(shape, window=self.window, sinks=self.sinks)

    def _sees_less(self, shape: LayerConfig) -> bool:
        return shape.window is not None and shape.window <= self.window

    def _full(
        self, model: WholeModel, far: Sequence[int], count: int, states: Sequence[Tensor]
    ) -> set[int]:
        """Return the layers that go on seeing everything, `count` of those in `far`."""
        if self.by != "loss":
            return placed_layers(self.by, far, count)
        costs = {index: self._cost(model, index, states) for index in far}
        return set(sorted(far, key=lambda index: -costs[index])[:count])

    def _cost(self, model: WholeModel, index: int, states: Sequence[Tensor]) -> float:
        """Return the divergence that the window of one layer makes, in nats a token."""
        shapes = list(model.config.layers)
        shapes[index] = self.near(shapes[index])
        ends = layer_states(model, shapes, index, states[index])
        return divergence(model, states[-1], ends[-1])


def placed_layers(place: str, layers: Sequence[int], count: int) -> set[int]:
    """Return `count` of some layers, the last of equal parts (even) or those in the middle."""
    if place == "even":
        return {layers[(part + 1) * len(layers) // count - 1] for part in range(count)}
    first = (len(layers) - count) // 2
    return set(layers[first : first + count])
