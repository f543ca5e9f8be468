"""Train which channels and heads stay, together with the weights, under a constraint of size."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from paceline.compress.reconstruct.recovery import Recovery, TrainedLayer
from paceline.compress.structure.base import KeptLayer, Structure
from paceline.compress.structure.llm_pruner import LLMPruner
from paceline.compress.structure.widths.gates import GatedLayer, Gates, keep_size, shift_to
from paceline.compress.structure.widths.pruner import LayerScores, WidthPruner, unit_size
from paceline.compress.structure.widths.slicing import check_sliceable
from paceline.compress.whole_model import WholeModel
from paceline.registry import check_range

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.compress.reconstruct.descent import Descent

_WARM = 0.5  # of the steps, in which the share that is to go grows from nothing
_SCORED = 8  # texts that gates begin by


@dataclass(frozen=True)
class MaskTrainer(WidthPruner):
    """Trains gates on channels and heads; those that are most open in the end stay.

    Gates begin in the order of first-order importances (as `llm_pruner`). The loss is the
    divergence from the original on the calibration texts; what gates leave open is held to a size
    that falls to the one that was asked for. One in eight texts is held out: where what
    was trained is no better on those than the first order, untrained, that is taken.

    Attributes:
        share: of the weights of the layers that is removed, 0.01 to 0.9. Default 0.2.
        multiple: widths of MLPs are rounded to multiples of it, 1 to 1024. Default 32.
        tokens: that are trained on, 1 to 10^9. Default 32000.
        rate: of Adam for the weights at the beginning, 0 to 1. Default 0.001.
        gate_rate: of Adam for the gates, 0 to 10. Default 0.1.
        batch: texts of a step, 1 to 1024. Default 2.
    """

    tokens: int = 32_000
    rate: float = 1e-3
    gate_rate: float = 0.1
    batch: int = 2

    parameters: ClassVar[str] = "lora"  # what is trained beside the gates, see `TrainedLayer`
    rank: ClassVar[int] = 32

    def __post_init__(self) -> None:
        WidthPruner.__post_init__(self)
        check_range(1, 10**9, self.name, tokens=self.tokens)
        check_range(1e-9, 1.0, self.name, rate=self.rate)
        check_range(1e-9, 10.0, self.name, gate_rate=self.gate_rate)
        check_range(1, 1024, self.name, batch=self.batch)

    @abstractmethod
    def constraints(self, layers: Sequence[GatedLayer]) -> list[list[Gates]]:
        """Return which gates are held to the share together; each is in one list."""

    def scores(self, model: WholeModel, base: WholeModel, folder: Path) -> list[LayerScores]:
        """Return the importances that gates begin by."""
        return LLMPruner(rows=_SCORED).scores(model, base, folder)

    def restructure(self, model: WholeModel, base: WholeModel, folder: Path) -> Structure:
        """See `StructureMethod`."""
        check_sliceable(self.name, model.config, model.layer(0))
        start = self.scores(model, base, folder)
        layers = self._layers(model, start)
        training = GatedRecovery(
            *(model, base.in_memory, layers, self.batch),
            constraints=self.constraints(layers),
            share=self.share,
        )
        size = min(self.batch, len(training.split.trained)) * model.texts.shape[1]
        training.steps = max(1, round(self.tokens / size))
        training.train(training.steps, self.rate, folder / "training.safetensors")
        after = model.with_layers(
            (shape, {**model.layer(index), **layer.final()})
            for index, (shape, layer) in enumerate(zip(model.config.layers, layers, strict=True))
        )
        ends = [
            LayerScores({name: each.logits.detach().double() for name, each in layer.gates.items()})
            for layer in layers
        ]
        first, last = self._whole(model, start), self._whole(after, ends)
        old, new = (_divergence(model, base, each, self.batch) for each in (first, last))
        widths = [layer.shape.intermediate for layer in (last if new < old else first)]
        words = f"instead of {old:.4f} by the order that it began with"
        if not new < old:
            words = f"not below the {old:.4f} of the order that it began with, which was taken"
        note = (
            f"{self.name} trained masks and weights on {training.steps * size} tokens and "
            f"left {min(widths)} to {max(widths)} MLP channels in a layer: the divergence from the "
            f"original on held-out texts is {new:.4f} nats a token, {words}."
        )
        return Structure(last if new < old else first, note)

    def _layers(self, model: WholeModel, start: Sequence[LayerScores]) -> list[GatedLayer]:
        """Return the layers with gates that have the order of the scores."""
        import torch

        generator = torch.Generator().manual_seed(0)
        layers = []
        for index, (shape, scores) in enumerate(zip(model.config.layers, start, strict=True)):
            weights = dict(model.layer(index))
            gates = {
                name: Gates(each, unit_size(weights, shape, name))
                for name, each in scores.units.items()
            }
            trained = TrainedLayer(weights, self.parameters, self.rank, generator)
            layers.append(GatedLayer(trained, gates, self.gate_rate / self.rate))
        return layers

    def _whole(self, model: WholeModel, scores: Sequence[LayerScores]) -> list[KeptLayer]:
        """Return the layers of a model cut by scores, with all of their tensors."""
        return [
            KeptLayer(layer.source, layer.shape, {**model.layer(layer.source), **layer.tensors})
            for layer in self.cut_by(scores, model).layers
        ]


@dataclass
class GatedRecovery(Recovery):
    """The distillation of a model with gates; see `Recovery`.

    Gradient projection instead of trained multipliers: of the gradient of the gates goes what would
    change the size, which is the multiplier of least squares, and before each step their logits
    are shifted by one number so that the size is right.

    Attributes:
        constraints: gates that are held to the share together.
        share: of their weights that is shut in the end.
        steps: that will be made; the share grows in the first half of them.
    """

    constraints: Sequence[Sequence[Gates]] = field(kw_only=True)
    share: float = field(kw_only=True)
    steps: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._step = 0

    def _restore(self, descent: Descent, file: Path) -> int:
        self._step = super()._restore(descent, file)
        return self._step

    def _backwards(self, rows: Tensor) -> float:
        """Add gradients that leave the size of what is open as it is."""
        import torch

        wanted = 1 - self.share * min(1.0, (self._step + 1) / max(1.0, _WARM * self.steps))
        for together in self.constraints:
            shift_to(together, wanted)
        generator = torch.Generator().manual_seed(self._step)
        for gates in (each for together in self.constraints for each in together):
            gates.draw(generator)
        loss = super()._backwards(rows)
        for together in self.constraints:
            keep_size(together)
        self._step += 1
        return loss


def _divergence(
    model: WholeModel, base: WholeModel, layers: Sequence[KeptLayer], batch: int
) -> float:
    """Return the divergence of a cut model from the original on the texts that are held out."""
    cut = model.with_layers((layer.shape, layer.tensors) for layer in layers)
    return Recovery(cut, base, [], batch).error([layer.tensors for layer in layers])
