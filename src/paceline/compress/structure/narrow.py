"""Narrower layers: fewer MLP channels and heads, the others refitted by least squares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.compress.structure.base import KeptLayer, Structure, StructureMethod
from paceline.compress.structure.widths.moments import Moments
from paceline.compress.structure.widths.removal import Removal, refit, removal
from paceline.compress.structure.widths.sensitivity import output_sensitivities
from paceline.compress.structure.widths.slicing import (
    check_sliceable,
    group_columns,
    keep_channels,
    keep_groups,
)
from paceline.compress.whole_model import WholeModel, run_frozen
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
    missing = {253: "bytes stand for the measured latency table; no search against it, no training"}
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
        steps = {part.key: count for part, count in counts}
        layers = list(self._narrowed(model, steps, sensitivities))
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
                unit, together, size = self._units(shape, name, weights)
                order = removal(
                    weights[name],
                    moments.moment(name),
                    sensitivities[index][name] / 2,
                    unit,
                    steps * together,
                )
                yield _Part((index, name), order.costs[::together].tolist(), size * together)

    def _steps(self, shape: LayerConfig) -> dict[str, int]:
        """Return how many steps of removal each part of a layer allows."""
        steps = {"down": (shape.intermediate - 1) // self.multiple}
        if self.heads and shape.heads:
            steps["o"] = shape.kv_heads - 1
        return steps

    def _units(
        self, shape: LayerConfig, name: str, weights: Mapping[str, Tensor]
    ) -> tuple[int, int, int]:
        """Return inputs of a unit, units of a step, and the weights of a unit."""
        hidden = len(weights[name])
        if name == "down":
            return 1, self.multiple, hidden * (2 + ("gate" in weights))
        queries = shape.heads // shape.kv_heads * shape.head_dim
        return queries, 1, hidden * 2 * (queries + shape.head_dim)

    def _narrowed(
        self,
        model: WholeModel,
        counts: Mapping[tuple[int, str], int],
        sensitivities: Sequence[Mapping[str, Tensor]],
    ) -> Iterator[KeptLayer]:
        """Yield the narrower layers, each fitted on the outputs of those before it."""
        x = model.embed(model.texts)
        for index, shape in enumerate(model.config.layers):
            tensors = dict(model.layer(index))
            new: dict[str, Tensor] = {}
            for name in ("o", "down"):  # attention first: the MLP sees what is left of it
                steps = counts.get((index, name), 0)
                if not steps:
                    continue
                weigh = sensitivities[index][name]
                shape, made = self._fit(model, shape, tensors, x, name, steps, weigh)
                tensors |= made
                new |= made
            x = run_frozen(model.config, shape, tensors, x)
            yield KeptLayer(index, shape, new)

    def _fit(
        self,
        model: WholeModel,
        shape: LayerConfig,
        tensors: Mapping[str, Tensor],
        x: Tensor,
        name: str,
        steps: int,
        weigh: Tensor,
    ) -> tuple[LayerConfig, dict[str, Tensor]]:
        """Return a layer without some inputs of `o` or `down`, the others refitted."""
        import torch

        moments = Moments()
        run_frozen(model.config, shape, tensors, x, moments.tap())
        moment, weight = moments.moment(name), tensors[name]
        unit, together, _ = self._units(shape, name, tensors)
        gone: Removal = removal(weight, moment, weigh, unit, steps * together)
        stay = torch.ones(weight.shape[1] // unit, dtype=torch.bool)
        stay[gone.order] = False
        kept = stay.nonzero()[:, 0]
        if name == "down":
            columns = kept
            shape, made = keep_channels(tensors, shape, kept)
        else:
            columns = group_columns(shape, kept)
            shape, made = keep_groups(tensors, shape, kept)
        made[name] = refit(
            weight.double() @ moment[:, columns].double(), moment[columns][:, columns]
        )
        return shape, made


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
