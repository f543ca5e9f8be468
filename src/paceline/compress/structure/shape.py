"""Give each layer a shape: so many MLP channels and key/value heads, the others refitted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from paceline.compress.structure.base import Structure, StructureMethod
from paceline.compress.structure.widths.refitted import narrowed_layers, units_in
from paceline.compress.structure.widths.sensitivity import output_sensitivities
from paceline.compress.structure.widths.slicing import check_sliceable
from paceline.compress.whole_model import WholeModel
from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.models.config import LayerConfig
from paceline.registry import Source, check_range, structures


@structures.register("shape", Exactness.LOSSY)
@dataclass(frozen=True)
class Shape(StructureMethod):
    """Cut every layer to sizes that are named, and refit `down` and `o` by least squares.

    Channels and heads go in the order of what their removal costs, as with `narrow`, which finds
    sizes by itself. A layer without channels has no MLP, one without heads no attention, and one
    without both is left out. `--budget tokens/s=...` writes such recipes.

    Attributes:
        mlp: MLP channels: a number for all layers, or one for each with / between them, e.g.
            1536/1024/0; empty keeps all. Default empty.
        heads: key/value heads, each with its queries, in the same way; empty keeps all. Default
            empty.
        rows: texts that gradients are computed on, 1 to 1000. Default 8.
    """

    mlp: str = ""
    heads: str = ""
    rows: int = 8

    source = Source(
        authors="Kurtic et al.",
        title="ZipLM: Inference-Aware Structured Pruning of Language Models",
        arxiv="2302.04089",
        section="section 3.1",
        note="the removal and the refitting alone; who names the sizes has searched them",
    )
    examples = ("shape:mlp=88,rows=2", "shape:heads=2,rows=2")

    def __post_init__(self) -> None:
        check_range(1, 1000, self.name, rows=self.rows)
        if not self.mlp and not self.heads:
            raise MethodError(
                f"{self.name} has no sizes; give mlp or heads, e.g. {self.name}:mlp=1024"
            )
        for setting in ("mlp", "heads"):
            self._numbers(setting)

    def _numbers(self, setting: str) -> list[int]:
        """Return the numbers of a setting; none where it is empty.

        Raises:
            MethodError: it has other words.
        """
        text = str(getattr(self, setting))
        parts = text.split("/") if text else []
        if not all(part.isascii() and part.isdecimal() and len(part) < 8 for part in parts):
            raise MethodError(
                f"{self.name}:{setting} is {text!a:.60}, expected whole numbers with / between "
                "them, e.g. 1536/1024/0"
            )
        return [int(part) for part in parts]

    def restructure(self, model: WholeModel, base: WholeModel, folder: Path) -> Structure:
        """See `StructureMethod`."""
        check_sliceable(self.name, model.config, model.layer(0))
        shapes = model.config.layers
        removed = {}
        for setting, name in (("mlp", "down"), ("heads", "o")):
            for index, size in enumerate(self._sizes(setting, name, shapes)):
                removed[index, name] = units_in(shapes[index], name) - size
        layers = list(narrowed_layers(model, removed, output_sensitivities(model, self.rows)))
        if not any(layer.shape.heads for layer in layers):
            raise MethodError(f"{self.name} leaves no layer with attention; give one of them heads")
        parts = sum(bool(layer.shape.heads) for layer in layers)
        inner = sum(layer.shape.intermediate for layer in layers)
        note = (
            f"{self.name} left {len(layers)} of {len(shapes)} layers, {parts} of them with "
            f"attention, and {inner} MLP channels in all."
        )
        return Structure(layers, note)

    def _sizes(self, setting: str, name: str, shapes: tuple[LayerConfig, ...]) -> list[int]:
        """Return the size of a part in each layer.

        Raises:
            MethodError: there are more or fewer numbers than layers, or one is too large.
        """
        sizes = self._numbers(setting)
        if not sizes:
            return [units_in(shape, name) for shape in shapes]
        if len(sizes) == 1:
            return [min(sizes[0], units_in(shape, name)) for shape in shapes]
        if len(sizes) != len(shapes):
            raise MethodError(
                f"{self.name}:{setting} has {len(sizes)} numbers, expected one, or {len(shapes)} "
                "for the layers of this model"
            )
        for index, size in enumerate(sizes):
            if size > units_in(shapes[index], name):
                raise MethodError(
                    f"{self.name}:{setting} is {size} in layer {index}, which has "
                    f"{units_in(shapes[index], name)}"
                )
        return sizes
