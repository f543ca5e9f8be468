"""Inheritune: the first layers of a model as a small model of their own, trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from paceline.compress.structure.base import KeptLayer, Structure, StructureMethod
from paceline.compress.structure.recover import Recover
from paceline.compress.whole_model import WholeModel
from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.registry import Source, check_range, structures


@structures.register("inheritune", Exactness.LOSSY)
@dataclass(frozen=True)
class Inheritune(StructureMethod):
    """Keep the first layers, with embedding and head, and train all of their weights.

    The loss is the divergence from the original on the calibration texts, as with `recover`.

    Attributes:
        layers: that are kept, 1 to 10000. Default 15.
        tokens: that are trained on, 1 to 10^9. Default 32000.
        rate: of Adam at the beginning, 0 to 1; it falls to zero by a cosine. Default 0.0003.
        batch: texts of a step, 1 to 1024. Default 2.
    """

    layers: int = 15
    tokens: int = 32_000
    rate: float = 3e-4
    batch: int = 2

    source = Source(
        authors="Sanyal et al.",
        title="Pre-training Small Base LMs with Fewer Tokens",
        arxiv="2404.08634",
        section="section 2",
        note="distils from the original instead of pre-training on its data",
    )
    catalogue = (153,)
    missing = {153: "a billion tokens of training, which takes a GPU"}
    examples = ("inheritune:layers=1,tokens=200",)

    def __post_init__(self) -> None:
        check_range(1, 10_000, self.name, layers=self.layers)
        check_range(1, 10**9, self.name, tokens=self.tokens)
        check_range(1e-9, 1.0, self.name, rate=self.rate)
        check_range(1, 1024, self.name, batch=self.batch)

    def restructure(self, model: WholeModel, base: WholeModel, folder: Path) -> Structure:
        """See `StructureMethod`.

        Raises:
            MethodError: the model has no more layers than are kept, or none of them attends.
        """
        shapes = model.config.layers
        if self.layers >= len(shapes):
            raise MethodError(
                f"{self.name}:layers is {self.layers}, expected fewer than the {len(shapes)} "
                "layers of this model"
            )
        first = shapes[: self.layers]
        if not any(shape.heads for shape in first):
            raise MethodError(f"{self.name}:layers {self.layers} leaves no attention; keep more")
        small = model.with_layers((shape, model.layer(at)) for at, shape in enumerate(first))
        training = Recover(self.tokens, "all", rate=self.rate, batch=self.batch)
        made = training.restructure(small, base, folder)
        layers = [KeptLayer(layer.source, layer.shape, layer.tensors) for layer in made.layers]
        note = f"{self.name} kept the first {self.layers} of {len(shapes)} layers. {made.note}"
        return Structure(layers, note)
