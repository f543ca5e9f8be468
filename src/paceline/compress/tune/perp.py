"""PERP: after pruning, train norms, biases and products that keep the zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from paceline.compress.base import ModelTuner
from paceline.compress.reconstruct.distillation import CompressedModel, fixed_layer
from paceline.compress.whole_model import WholeModel
from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.registry import Source, check_range, tuners

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear

PARAMETERS = ("norms", "masked")
_RATES = {"norms": 5e-3, "masked": 1e-3}


@tuners.register("perp", Exactness.LOSSY)
@dataclass(frozen=True)
class PERP(ModelTuner):
    """Train a few parameters of a compressed model towards the original, codes and zeros fixed.

    `norms` trains the vectors, norms and biases, whatever form the matrices have. `masked` also
    trains a product of low rank for each pruned matrix, which counts only where weights were kept
    and is added to them in the end, so that nothing is stored or multiplied in addition. The loss
    is the divergence from the original on the calibration texts, of which one in eight is held out;
    where the divergence on those does not fall, all stays as it was. An interrupted training goes
    on where it was.

    Attributes:
        tokens: that are trained on, 1 to 10^9; texts come again where there are fewer. Default
            16000.
        parameters: what is trained, norms or masked. Default norms.
        rank: of the products, 1 to 1024. Default 16.
        rate: of Adam at the beginning, 0 to 1; it falls to zero by a cosine. 0, the default, is
            0.005 for norms and 0.001 for masked.
        batch: texts of a step, 1 to 1024. Default 2.
    """

    tokens: int = 16_000
    parameters: str = "norms"
    rank: int = 16
    rate: float = 0.0
    batch: int = 2

    source = Source(
        authors="Zimmer et al.",
        title="PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs",
        arxiv="2312.15230",
        section="section 3, MaskLoRA and norms with biases",
        note="distils from the original instead of training on labels",
    )
    catalogue = (393,)
    examples = ("perp:tokens=400", "perp:tokens=400,rate=0.001")
    keeps_codes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range(1, 10**9, self.name, tokens=self.tokens)
        check_range(1, 1024, self.name, rank=self.rank, batch=self.batch)
        check_range(0, 1, self.name, rate=self.rate)
        if self.parameters not in PARAMETERS:
            raise MethodError(
                f"{self.name}:parameters is {self.parameters!r}, expected {', '.join(PARAMETERS)}"
            )

    def tune(self, model: CompressedModel) -> list[dict[str, Linear | Tensor]]:
        """See `ModelTuner`."""
        import torch

        from paceline.compress.reconstruct.recovery import Recovery, TrainedLayer

        pruned = [_pruned(each) if self.parameters == "masked" else () for each in model.stored]
        if self.parameters == "masked" and not any(pruned):
            raise MethodError(
                f"{self.name}:parameters=masked trains matrices with zeros, and the recipe stores "
                "none; put a pruner before it, without a quantizer, or take parameters=norms"
            )
        generator = torch.Generator().manual_seed(0)
        before = [fixed_layer(each) for each in model.stored]
        layers = [
            TrainedLayer(weights, "norms", self.rank, generator, masked=names)
            for weights, names in zip(before, pruned, strict=True)
        ]
        shapes = model.config.layers
        teacher = WholeModel(
            model.config, lambda index: model.layers[index], model.outer, model.texts
        )
        student = teacher.with_layers(zip(shapes, before, strict=True))
        recovery = Recovery(student, teacher, layers, self.batch)
        size = min(self.batch, len(recovery.split.trained)) * model.texts.shape[1]
        steps, old = max(1, round(self.tokens / size)), recovery.error(before)
        state = None if model.folder is None else model.folder / "perp.safetensors"
        recovery.train(steps, self.rate or _RATES[self.parameters], state)
        tuned = [layer.final() for layer in layers]
        if not recovery.error([one | two for one, two in zip(before, tuned, strict=True)]) < old:
            return [dict(each) for each in model.stored]
        return [_stored(one, two) for one, two in zip(model.stored, tuned, strict=True)]


def _pruned(stored: Mapping[str, Linear | Tensor]) -> Sequence[str]:
    """Return the matrices that are stored as the weights that a pruner left."""
    from paceline.models.tensors import Sparse

    return [name for name, each in stored.items() if isinstance(each, Sparse)]


def _stored(
    old: Mapping[str, Linear | Tensor], tuned: Mapping[str, Tensor]
) -> dict[str, Linear | Tensor]:
    """Return a layer with trained vectors, and trained weights where those of a matrix stay."""
    import numpy as np

    from paceline.models.tensors import Sparse

    made = dict(old)
    for name, each in tuned.items():
        form = old[name]
        if isinstance(form, Sparse):
            values = np.ascontiguousarray(each.numpy()[form.mask])
            made[name] = replace(form, values=values, dtype="F32")
        else:
            made[name] = each
    return made
