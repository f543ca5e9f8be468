"""Levels of whole modules: the attention or the MLP of a layer, narrower or gone, in fewer bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from paceline.compress.structure.widths.refitted import units_in, without_part
from paceline.errors import MethodError
from paceline.models.config import LayerConfig, ModelConfig
from paceline.registry import structures

PARTS = ("o", "down")  # names of the modules: those of the matrices that read heads and channels
WORDS = ("narrow", "attention_drop", "layer_drop")
_QUARTERS = (1.0, 0.75, 0.5, 0.25)  # of the units of a module that stay
_MULTIPLES = (32, 4)  # of the channels that stay, where an eighth of all is more


class Level(NamedTuple):
    """A form that a module can take.

    Attributes:
        units: channels or groups of heads that stay; 0 where the module goes.
        recipe: place among the recipes of weights; 0 where the module goes.
    """

    units: int
    recipe: int


@dataclass(frozen=True)
class ShapeWords:
    """What a search may do to the shapes of layers, from the names of structures.

    Attributes:
        widths: layers may get narrower (`narrow`).
        attention: the attention of a layer may go (`attention_drop`).
        layers: attention and MLP may go, both of them or one (`layer_drop`).
    """

    widths: bool = False
    attention: bool = False
    layers: bool = False

    @property
    def any(self) -> bool:
        """Whether shapes may change at all."""
        return self.widths or self.attention or self.layers

    def levels(self, shape: LayerConfig, name: str, recipes: int) -> list[Level]:
        """Return the forms of a module, the whole one first."""
        count = units_in(shape, name)
        if not count:
            return []
        sizes = [count]
        if self.widths:
            sizes = sorted({_rounded(count * part, count, name) for part in _QUARTERS})[::-1]
        found = [Level(size, recipe) for size in sizes for recipe in range(recipes)]
        if self.layers or (self.attention and name == "o"):
            found.append(Level(0, 0))
        return found


def split_words(text: str) -> tuple[ShapeWords, str]:
    """Return what `narrow`, `attention_drop` and `layer_drop` in a recipe allow, and the rest.

    Raises:
        MethodError: one of them has settings, which the search would choose.
    """
    names = [name for name in structures.names() if name in WORDS]
    if not any(name in text for name in names):
        return ShapeWords(), text
    found, rest = set(), []
    for part in text.split("|"):
        kept = []
        for word in part.strip().split("+"):
            name = word.partition(":")[0].strip()
            if name not in WORDS:
                kept.append(word)
                continue
            if ":" in word:
                raise MethodError(
                    f"{word.strip()!r} has settings, which --budget searches; write {name} alone"
                )
            found.add(name)
        rest.append("+".join(kept) or "keep")
    unique = "|".join(dict.fromkeys(rest))
    return ShapeWords("narrow" in found, "attention_drop" in found, "layer_drop" in found), unique


def shape_with(shape: LayerConfig, name: str, units: int) -> LayerConfig:
    """Return a layer's shape with so many units of a module."""
    if not units:
        return without_part(shape, name)
    if name == "down":
        return replace(shape, intermediate=units)
    return replace(shape, heads=units * (shape.heads // shape.kv_heads), kv_heads=units)


def module_of(shape: LayerConfig, name: str) -> LayerConfig:
    """Return the shape of a layer that has one of its modules alone."""
    return without_part(shape, "down" if name == "o" else "o")


def modules(config: ModelConfig) -> list[tuple[int, str]]:
    """Return the index of the layer and the name of every module, in order."""
    return [
        (index, name)
        for index, shape in enumerate(config.layers)
        for name in PARTS
        if units_in(shape, name)
    ]


def shape_recipe(config: ModelConfig, sizes: Sequence[int]) -> str:
    """Return the structure that gives every module its units; empty where all stay."""
    chosen = dict(zip(modules(config), sizes, strict=True))
    parts = []
    for setting, name in (("mlp", "down"), ("heads", "o")):
        own = [chosen.get((index, name), 0) for index in range(len(config.layers))]
        if own != [units_in(shape, name) for shape in config.layers]:
            parts.append(f"{setting}={'/'.join(map(str, own))}")
    return f"shape:{','.join(parts)}" if parts else ""


def _rounded(size: float, count: int, name: str) -> int:
    """Return a number of units near a size, at least one."""
    multiple = next((each for each in _MULTIPLES if count >= 8 * each), 1) if name == "down" else 1
    return min(max(round(size / multiple) * multiple, multiple), count)
