"""Narrower layers: fewer MLP channels and heads, the others refitted by least squares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.compress.structure.base import Structure, StructureMethod
from paceline.compress.structure.widths.moments import Moments
from paceline.compress.structure.widths.pruner import unit_size
from paceline.compress.structure.widths.refitted import narrowed_layers, unit_inputs
from paceline.compress.structure.widths.removal import removal
from paceline.compress.structure.widths.sensitivity import output_sensitivities
from paceline.compress.structure.widths.slicing import check_sliceable
from paceline.compress.whole_model import WholeModel
from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.registry import Source, check_range, structures

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.config import LayerConfig


@structures.register("narrow", Exactness.LOSSY)
@dataclass(frozen=True)
class Narrow(StructureMethod):
    """Remove MLP channels and groups of heads, and refit `down` and `o` by least squares.

    Within a layer the channel goes whose removal, with all others refitted, costs least; a group of
    heads is a key/value head with its queries. How much each layer loses follows from the costs of
    all layers in nats, by gradients of the whole model, for as many weights. Layers are narrowed in
    order, each on what the narrower layers before it put out.

    Attributes:
        share: of the weights of the layers that is removed, 0.01 to 0.9. Default 0.2.
        multiple: MLP channels that go together, 1 to 1024: widths stay multiples of it. Default 32.
        heads: whether groups of heads go, too. Default true.
        rows: texts that gradients are computed on, 1 to 1000. Default 8.
    """

    share: float = 0.2
    multiple: int = 32
    heads: bool = True
    rows: int = 8

    source = Source(
        authors="Kurtic et al.",
        title="ZipLM: Inference-Aware Structured Pruning of Language Models",
        arxiv="2302.04089",
        section="section 3.1",
        note="costs are weighed by the Fisher information of outputs, and bought by weights, which "
        "the time of a token follows, not by a table of latencies; no gradual training",
    )
    catalogue = (253,)
    missing = {253: "weights stand for times, which the allocator ziplm takes; no gradual training"}
    examples = ("narrow:multiple=4,rows=2", "narrow:share=0.3,heads=false")

    def __post_init__(self) -> None:
        check_range(0.01, 0.9, self.name, share=self.share)
        check_range(1, 1024, self.name, multiple=self.multiple)
        check_range(1, 1000, self.name, rows=self.rows)

    def restructure(self, model: WholeModel, base: WholeModel, folder: Path) -> Structure:
        """See `StructureMethod`."""
        check_sliceable(self.name, model.config, model.layer(0))
        sensitivities = output_sensitivities(model, self.rows)
        parts = list(self._parts(model, sensitivities))
        counts = _bought(parts, self.share * model.matrix_weights)
        if counts is None:
            most = "all MLP channels" + (" and heads but one group each" if self.heads else "")
            raise MethodError(
                f"{self.name}:share is {self.share}, which is more than {most} of this model; take "
                f"less, or multiple below {self.multiple}"
            )
        units = {part.key: count * self._together(part.key[1]) for part, count in counts}
        layers = list(narrowed_layers(model, units, sensitivities))
        sizes = [layer.shape.intermediate for layer in layers]
        groups = [layer.shape.kv_heads for layer in layers]
        note = (
            f"{self.name} left {min(sizes)} to {max(sizes)} MLP channels and {min(groups)} to "
            f"{max(groups)} key/value heads in a layer."
        )
        return Structure(layers, note)

    def _parts(
        self, model: WholeModel, sensitivities: Sequence[Mapping[str, Tensor]]
    ) -> Iterator[_Part]:
        """Yield what can be removed of each layer, and what that costs."""
        x = model.embed(model.texts)
        for index, shape in enumerate(model.config.layers):
            moments = Moments()
            x = model.run(index, x, moments.tap())
            weights = model.layer(index)
            for name, steps in self._steps(shape).items():
                if steps < 1:
                    continue
                together = self._together(name)
                order = removal(
                    weights[name],
                    moments.moment(name),
                    sensitivities[index][name] / 2,
                    unit_inputs(shape, name),
                    steps * together,
                )
                size = unit_size(weights, shape, name) * together
                yield _Part((index, name), order.costs[::together].tolist(), size)

    def _steps(self, shape: LayerConfig) -> dict[str, int]:
        """Return how many steps of removal each part of a layer allows."""
        steps = {"down": (shape.intermediate - 1) // self.multiple}
        if self.heads and shape.heads:
            steps["o"] = shape.kv_heads - 1
        return steps

    def _together(self, name: str) -> int:
        """Return how many units a step removes."""
        return self.multiple if name == "down" else 1


@dataclass(frozen=True)
class _Part:
    """Channels or heads of one layer.

    Attributes:
        key: index of the layer, and the matrix whose inputs go.
        costs: cumulative, of so many steps of removal.
        size: weights that a step removes.
    """

    key: tuple[int, str]
    costs: Sequence[float]
    size: int

    def best(self, done: int, wanted: float) -> tuple[float, int] | None:
        """Return the lowest cost of a weight behind `done` steps, and how many more that takes."""
        more = range(1, len(self.costs) - done)
        rates = [
            ((self.costs[done + n] - self.costs[done]) / (n * self.size), n)
            for n in more
            if n == 1 or n * self.size <= wanted
        ]
        return min(rates, default=None)


def _bought(parts: Sequence[_Part], wanted: float) -> list[tuple[_Part, int]] | None:
    """Return how many steps each part loses so that `wanted` weights go; None if that cannot be."""
    done = [0] * len(parts)
    while wanted > 0:
        offers = [
            (rate, place, count)
            for place, part in enumerate(parts)
            if (offer := part.best(done[place], wanted)) is not None
            for rate, count in [offer]
        ]
        if not offers:
            return None
        _, place, count = min(offers)
        done[place] += count
        wanted -= count * parts[place].size
    return list(zip(parts, done, strict=True))
