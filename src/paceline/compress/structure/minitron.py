"""Minitron: try several splits of depth and width, train each a little, and keep the best."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from paceline.compress.structure.base import Structure
from paceline.compress.structure.widths.moments import Moments
from paceline.compress.structure.widths.pruner import (
    Counts,
    LayerScores,
    WidthPruner,
    even_counts,
    parts_of,
    per_unit,
)
from paceline.compress.whole_model import WholeModel
from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.models.formats.writer import write_json
from paceline.registry import Source, check_range, structures

_RATE = 5e-3  # of the short training of norms


@structures.register("minitron", Exactness.LOSSY)
@dataclass(frozen=True)
class Minitron(WidthPruner):
    """Remove layers, heads and channels by the size of activations, in the best of several shapes.

    The importance of a channel or a head is the norm of its activations over the calibration texts;
    layers go whose outputs are most similar to their inputs. Each shape leaves a number of layers
    out, from none to `layers`, and takes the rest of the share from all widths alike. Shapes are
    ranked after a short training of their norms, as their order changes with it. `+recover` is the
    distillation that follows.

    Attributes:
        share: of the weights of the layers that is removed, 0.01 to 0.9. Default 0.2.
        multiple: widths of MLPs are rounded to multiples of it, 1 to 1024. Default 32.
        layers: most layers that a shape leaves out, 0 to 1000. Default 3.
        tokens: that each shape is trained on, 1 to 10^9. Default 4000.
    """

    layers: int = 3
    tokens: int = 4000

    source = Source(
        authors="Muralidharan et al.",
        title="Compact Language Models via Pruning and Knowledge Distillation",
        arxiv="2407.14679",
        section="sections 2 and 3",
        note="the hidden size stays; see `slicegpt`",
    )
    catalogue = (99,)
    missing = {99: "retraining on billions of tokens, which takes GPUs; channels of the embedding"}
    examples = ("minitron:multiple=4,layers=1,tokens=100",)

    def __post_init__(self) -> None:
        WidthPruner.__post_init__(self)
        check_range(0, 1000, self.name, layers=self.layers)
        check_range(1, 10**9, self.name, tokens=self.tokens)

    def scores(self, model: WholeModel, base: WholeModel, folder: Path) -> list[LayerScores]:
        """Return the root mean square of the activations of each unit."""
        scores = []
        x = model.embed(model.texts)
        for index, shape in enumerate(model.config.layers):
            moments, weights = Moments(diagonal=True), model.layer(index)
            x = model.run(index, x, moments.tap())
            units = {
                name: per_unit(moments.moment(name).double(), name, shape).sqrt()
                for name in parts_of(weights)
            }
            scores.append(LayerScores(units))
        return scores

    def counts(
        self, scores: Sequence[LayerScores], sizes: Sequence[Mapping[str, int]], removed: float
    ) -> Counts:
        """Return the same share for all layers."""
        total = sum(
            size[name] * len(own)
            for layer, size in zip(scores, sizes, strict=True)
            for name, own in layer.units.items()
        )
        return even_counts(scores, [removed / max(total, 1)] * len(scores))

    def restructure(self, model: WholeModel, base: WholeModel, folder: Path) -> Structure:
        """See `StructureMethod`.

        Raises:
            MethodError: the model has no more layers than a shape would leave out.
        """
        count = len(model.config.layers)
        if self.layers >= count:
            raise MethodError(
                f"{self.name}:layers is {self.layers}, expected fewer than the {count} layers of "
                "this model"
            )
        file = folder / "shapes.json"
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        made: dict[int, Structure] = {}
        for depth in range(self.layers + 1):
            made[depth] = self.after_dropping(depth, model, base, folder)
            if str(depth) not in known:
                known[str(depth)] = self._error(made[depth], model, base)
                write_json(file, known)
        best = min(made, key=lambda depth: known[str(depth)])
        tried = ", ".join(f"{known[str(depth)]:.4f}" for depth in made)
        note = (
            f"{made[best].note} Of shapes without 0 to {self.layers} layers, {self.name} took that "
            f"without {best}; after a short training they were {tried} nats a token away."
        )
        return Structure(made[best].layers, note)

    def _error(self, made: Structure, model: WholeModel, base: WholeModel) -> float:
        """Return the divergence from the original after the norms were trained a little."""
        import torch

        from paceline.compress.reconstruct.recovery import Recovery, TrainedLayer
        from paceline.compress.structure.base import kept_tensors

        weights = [
            kept_tensors({**model.layer(layer.source), **layer.tensors}, layer.shape)
            for layer in made.layers
        ]
        shapes = [layer.shape for layer in made.layers]
        generator = torch.Generator().manual_seed(0)
        layers = [TrainedLayer(each, "norms", 1, generator) for each in weights]
        student = model.with_layers(zip(shapes, weights, strict=True))
        recovery = Recovery(student, base.in_memory, layers, 2)
        size = min(2, len(recovery.split.trained)) * model.texts.shape[1]
        recovery.train(max(1, round(self.tokens / size)), _RATE, None)
        with torch.no_grad():
            return recovery.error(recovery.trained_weights())
